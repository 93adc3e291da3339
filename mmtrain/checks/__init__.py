"""Checks of encoded samples, independent of the encoder."""
