"""Read a store: arrays, rows, coordinates, labels and images."""
