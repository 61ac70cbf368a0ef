"""The benchmark of training steps, ``sparse-unsloth bench``: dense and sparse methods side by side."""
