"""`mmtrain merge`: the base model and an adapter become one model."""
