"""Measures mmtrain: see __main__.py."""
