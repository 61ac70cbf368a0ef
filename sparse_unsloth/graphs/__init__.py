"""CUDA graphs of layers, and length buckets."""
