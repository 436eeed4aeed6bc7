"""Other tools, run as their own documentation says, over the same model, tokens and bytes."""
