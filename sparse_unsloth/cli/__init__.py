"""The command line `sparse-unsloth`: one module per command."""

from sparse_unsloth.cli.main import main

__all__ = ["main"]
