"""Predicts cost and gain of a training before it begins: the command ``sparse-unsloth estimate``."""
