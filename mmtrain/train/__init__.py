"""Training: the loss, the optimizer, the loop, checkpoints and what is left at the end."""
