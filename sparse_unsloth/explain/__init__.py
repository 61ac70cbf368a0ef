"""What sparsity does in a training, layer by layer: how stable the choice of channels is, and what it captures."""
