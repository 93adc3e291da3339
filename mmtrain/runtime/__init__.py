"""Processes, devices and the environment."""
