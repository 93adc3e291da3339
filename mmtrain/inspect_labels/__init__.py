"""`mmtrain inspect-labels`: which tokens are trained on, from the same stored encoding that training reads."""
