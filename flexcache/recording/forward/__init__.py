"""Prepare the inputs of a forward, and turn its activations into rows."""
