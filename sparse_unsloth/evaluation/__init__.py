"""Evaluates trained adapters with public libraries: the commands ``sparse-unsloth evaluate`` and ``compare``."""
