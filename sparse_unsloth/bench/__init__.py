"""Measures training steps, dense and sparse: the command ``sparse-unsloth bench``."""
