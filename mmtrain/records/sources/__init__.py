"""Files of records with random access, each kind with the same protocol."""
