"""Defines the sizes of the kernel suite's cases, and draws their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.tokens.partition import TokenPartition


@dataclass(frozen=True)
class Sizes:
    """One decoder layer, a batch by role, and what is selected.

    Args:
        kept: MLP channels, one case each; ``keys`` key channels (an even number), and as many value channels.
        ranks: of LoRA, the first one in all cases; ``factors`` of the estimator, which looks at ``looked_at`` rows.
    """

    hidden: int
    intermediate: int
    kv_heads: int
    groups: int
    head_dim: int
    dense: int
    context: int
    padding: int
    kept: tuple[int, ...]
    keys: int
    ranks: tuple[int, ...]
    factors: int
    looked_at: int

    @property
    def rows(self) -> int:
        return self.dense + self.context + self.padding

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        size = self.kv_heads * self.head_dim
        return self.groups * size, size, size


LLAMA_3_8B = Sizes(4096, 14336, 8, 4, 128, 2048, 6144, 0, (144, 3584, 7168), 256, (16, 64), 8, 1024)
"""At the wizardlm shape: four sequences of 2048 tokens, of which the last 512 have labels."""
TINY = Sizes(64, 160, 2, 2, 16, 12, 24, 3, (16,), 8, (4,), 4, 12)
ODD = Sizes(74, 131, 3, 2, 10, 17, 67, 3, (1, 17), 6, (5, 17), 3, 21)
EVEN = Sizes(128, 192, 2, 2, 32, 32, 64, 16, (32,), 16, (16,), 8, 32)
"""Two small layers: nothing is a multiple of 16, and everything is: Triton compiles other code for either."""


class Draw:
    """Random tensors on a device, in the dtype of the products unless said otherwise."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.randn(*shape, device=self.device, generator=self.generator)
        return tensor.mul_(scale).to(dtype or self.dtype)

    def order(self, size: int) -> Tensor:
        return torch.randperm(size, device=self.device, generator=self.generator)

    def index(self, size: int, count: int) -> Tensor:
        return self.order(size)[:count].sort().values

    def partition(self, dense: int, context: int, padding: int) -> TokenPartition:
        order = self.order(dense + context + padding)
        parts = [part.sort().values for part in order.split([dense, context, padding])]
        return TokenPartition((1, len(order)), *parts, parts[0])
