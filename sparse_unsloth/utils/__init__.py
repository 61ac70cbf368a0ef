"""Ranks, checksummed files, versions, saved runs. Nothing about sparsity."""
