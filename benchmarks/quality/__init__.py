"""Measures what sparsity costs in quality at equal cost, by paired trainings of a small model."""
