"""`mmtrain eval perplexity`: how likely the right answers are, and whether the model looks at the images."""
