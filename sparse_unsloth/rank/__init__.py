"""Rank-sparse LoRA: adapters of very high rank, of which each step computes only the most important components.

For each batch a layer chooses a set ``S`` of ``k`` components. With ``A [r, in]`` and ``B [out, r]`` its LoRA branch is
``scale * sqrt(r / k) * sum over i in S of (x A_i') B_i'``. Gradients are the exact gradients of this forward with ``S``
as a constant. `RankConfig` defines how ``S`` is chosen.

The public names load when they are first used, so recipes are checked without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_unsloth.rank.application import apply, get_rank_state, remove
    from sparse_unsloth.rank.checkpoint import retained, save_pruned_checkpoint
    from sparse_unsloth.rank.config import RankConfig, RankError
    from sparse_unsloth.rank.patching import patch

_HOMES = {
    "RankConfig": "config",
    "RankError": "config",
    "apply": "application",
    "get_rank_state": "application",
    "patch": "patching",
    "remove": "application",
    "retained": "checkpoint",
    "save_pruned_checkpoint": "checkpoint",
}
__all__ = [
    "RankConfig",
    "RankError",
    "apply",
    "get_rank_state",
    "patch",
    "remove",
    "retained",
    "save_pruned_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
