"""Join tables of labels to a store after its capture, remove them, and carry them to other stores."""
