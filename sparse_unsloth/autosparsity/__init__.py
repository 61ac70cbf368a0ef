"""Per-layer sparsity from the user's own data: measured sensitivities, and the allocation that they ask for."""
