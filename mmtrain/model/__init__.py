"""The model: loading, its parts and what learns of them, positions, dropout."""
