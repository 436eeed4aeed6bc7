"""Find a site in a model: its modules and tensor slices, for every model family."""
