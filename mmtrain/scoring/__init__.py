"""What training and evaluation share: scores of a model on samples."""
