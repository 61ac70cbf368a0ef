"""The demonstration: dense and sparse steps in turns; stock and `auto` on a GPU."""

from sparse_unsloth.quickstart.run import quickstart

__all__ = ["quickstart"]
