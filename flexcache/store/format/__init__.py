"""The disk format: schema, shards, data types, ledger and metadata; see docs/format.md."""
