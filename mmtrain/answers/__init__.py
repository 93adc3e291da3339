"""`mmtrain eval answers`: what a model answers, how good that is, and how good it is to answer without looking."""
