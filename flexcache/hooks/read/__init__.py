"""Read activations with hooks that pass them to a sink."""
