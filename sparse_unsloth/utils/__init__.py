"""Ranks, checksummed files, versions. Nothing about sparsity."""
