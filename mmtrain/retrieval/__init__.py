"""`mmtrain eval retrieval`: how well items find the items that match them."""
