"""Channel sparsity: which channels a batch needs (SparseLoRA)."""
