"""Activations to and from the files of others: safetensors, npy, Parquet, and what torch saves."""
