"""Ranks the rank components of LoRA layers, and prunes A, B and the optimiser's state to the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

METHODS = ("energy", "magnitude", "random")


@dataclass(frozen=True)
class LoraPair:
    """The trained factors of one layer: modules whose weights are ``A [r, in]`` and ``B [out, r]``."""

    name: str
    A: nn.Linear
    B: nn.Linear

    @property
    def rank(self) -> int:
        return len(self.A.weight)


def lora_pairs(model: nn.Module, adapter: str = "default") -> list[LoraPair]:
    """Lists every LoRA layer with linear factors in ``model``."""
    return [
        LoraPair(name, module.lora_A[adapter], module.lora_B[adapter])
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", {})
    ]


def component_scores(pair: LoraPair, method: str, generator: torch.Generator) -> Tensor:
    """Scores components ``[r]`` by "energy" ``|B_i|^2 |A_i|^2``, "magnitude" ``|B_i|^2 + |A_i|^2``, or "random".

    Energy is the squared norm of component ``i`` of ``B A``. Unlike magnitude it does not change when ``A_i`` is scaled
    and ``B_i`` is scaled by the inverse.

    Raises:
        ValueError: the method is unknown.
    """
    a, b = pair.A.weight.detach().square().sum(1), pair.B.weight.detach().square().sum(0)
    if method == "energy":
        return a * b
    if method == "magnitude":
        return a + b
    if method == "random":
        return torch.rand(pair.rank, generator=generator)
    raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")


def keep_components(pair: LoraPair, keep: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Prunes ``pair`` to the components ``keep`` (int64 ``[k]``) in A, B and the optimiser's moments.

    The parameters stay the same objects, so that the optimiser continues with them; LoRA's scaling does not change.
    """
    for module, dim in ((pair.A, 0), (pair.B, 1)):
        parameter = module.weight
        shape = parameter.shape
        parameter.grad = None
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.shape == shape:
                optimizer.state[parameter][key] = value.index_select(dim, keep)
        parameter.data = parameter.data.index_select(dim, keep)
    pair.A.out_features = pair.B.in_features = len(keep)
