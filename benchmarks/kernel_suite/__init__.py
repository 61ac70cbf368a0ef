"""Compares each kernel of kernels/ with its PyTorch reference and its floor."""
