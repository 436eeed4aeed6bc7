"""Write a store: its skeleton, slabs, shards, tables, workers and claims."""
