"""Reads records from files and turns them into conversations."""
