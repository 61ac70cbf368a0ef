"""Rank-sparse LoRA: adapters of very high rank, of which each step computes only the components that matter.

With ``A [r, in]``, ``B [out, r]`` and the set ``S`` of components that a layer chose for this batch, the branch is
``scale * sum over i in S of (x A_i') B_i'``. Gradients are exact for this forward, ``S`` constant: by autograd, through
the selection of rows of ``A`` and columns of ``B``. See `RankConfig` for how ``S`` is chosen.
"""

from sparse_unsloth.rank.apply import apply, get_rank_state, remove
from sparse_unsloth.rank.checkpoint import retained, save_pruned_checkpoint
from sparse_unsloth.rank.config import RankConfig, RankError
from sparse_unsloth.rank.patching import patch

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
