"""Each kernel of kernels/ against its PyTorch reference and its floor."""
