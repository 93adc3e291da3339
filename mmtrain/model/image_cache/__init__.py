"""Outputs of a frozen vision tower and projector, cached."""
