"""Where the bytes of a store lie: a local folder or object storage; atomic files and safe paths."""
