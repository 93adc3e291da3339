"""Which component to train: see __main__.py."""
