"""From encoded samples to the batches of a step."""
