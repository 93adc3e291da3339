"""Checks of encoded samples that do not know the encoder."""
