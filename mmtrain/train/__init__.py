"""Training: the loss, the optimizer, the loop, checkpoints and the saved adapter."""
