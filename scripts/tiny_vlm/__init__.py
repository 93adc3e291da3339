"""Makes the tiny model and its data: see __main__.py, data.py and answers.py."""
