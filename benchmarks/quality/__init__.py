"""Paired training runs of one small model, several seeds in lockstep: what sparsity costs in quality, at equal cost."""
