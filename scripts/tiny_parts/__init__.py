"""Makes two small parts for `mmtrain compose`: see __main__.py."""
