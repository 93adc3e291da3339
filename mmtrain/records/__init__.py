"""From files of records to conversations."""
