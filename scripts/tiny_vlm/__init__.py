"""Makes the tiny model and its data: see __main__.py and data.py."""
