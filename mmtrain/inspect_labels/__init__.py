"""`mmtrain inspect-labels`: what the model is taught, token by token, from the very encoding that training uses."""
