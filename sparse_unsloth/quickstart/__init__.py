"""The demonstration on a CPU: dense, sparse, and dense at equal cost."""

from sparse_unsloth.quickstart.run import quickstart

__all__ = ["quickstart"]
