"""Read activations as words: the logit lens and top examples."""
