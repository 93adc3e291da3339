"""Files of records with random access, each kind behind the same protocol."""
