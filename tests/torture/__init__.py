"""Tries to break runs: see __main__.py."""
