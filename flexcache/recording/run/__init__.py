"""Run the model over the planned batches and write the units."""
