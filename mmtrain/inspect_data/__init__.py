"""What a data set is made of, and what its training and evaluation data have in common."""
