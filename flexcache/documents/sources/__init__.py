"""Sources of documents: files, Arrow tables, datasets and dicts, each read in record batches."""
