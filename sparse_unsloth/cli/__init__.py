"""The command line ``sparse-unsloth``, a module for each command."""

from sparse_unsloth.cli.main import main

__all__ = ["main"]
