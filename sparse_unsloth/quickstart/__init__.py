"""The quickstart: dense, sparse, and dense at equal cost, on a CPU."""

from sparse_unsloth.quickstart.run import quickstart

__all__ = ["quickstart"]
