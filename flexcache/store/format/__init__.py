"""What is on disk: schema, shards, data types, ledger and metadata; docs/format.md states it in full."""
