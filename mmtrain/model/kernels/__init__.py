"""Faster equivalents of library modules. The rest of mmtrain works without them."""
