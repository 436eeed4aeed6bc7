"""Run the rest of a model from the cached activations of a batch."""
