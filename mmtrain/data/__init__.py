"""From a line of a file to the tensors of a micro-batch. Knows nothing of models beyond their processor."""
