"""CUDA graphs of whole layers."""
