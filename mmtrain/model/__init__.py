"""The model: loading, its parts and what is trainable of them, positions, dropout."""
