"""Store bytes in a local folder or on object storage: atomic files and safe paths."""
