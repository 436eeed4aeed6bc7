"""Read activations with hooks that hand them to a sink."""
