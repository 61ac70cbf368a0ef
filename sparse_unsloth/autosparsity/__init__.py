"""A sparsity per layer from the user's own data (`calibrate`)."""
