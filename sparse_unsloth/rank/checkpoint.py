"""Saves adapters of the retained components as standard PEFT folders, which load without this package."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_unsloth.rank.application import get_rank_state
from sparse_unsloth.rank.config import RankError
from sparse_unsloth.rank.state import RankState

MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights by the adapter's whole rank."""


def save_pruned_checkpoint(model: nn.Module, path: str | Path, retain_ratio: float) -> dict[str, int]:
    """Writes the most important components of a rank-sparse model as a PEFT adapter of lower rank.

    Plain PEFT computes with it what ``model`` computes inside `retained`. With the target density as ``retain_ratio``
    that is the model's evaluation. ``model`` is not changed.

    Args:
        path: the folder.
        retain_ratio: share of each layer's components, in (0, 1], rounded as in training; a layer with fewer unpruned
            components keeps those.

    Returns:
        The rank of each layer in the file, by name.

    Raises:
        RankError: the ratio is out of range, the model is not rank-sparse, or its initialisation changed base weights.
    """
    from peft.utils import get_peft_model_state_dict

    state = _state_of(model, retain_ratio)
    peft_model = state.model()
    config = copy.deepcopy(peft_model.peft_config[state.adapter])
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        raise RankError(
            f"init_lora_weights={start!r} changed the base weights by the whole adapter, and an adapter of lower rank "
            "would change them otherwise. Merge instead, or train with init_lora_weights=True."
        )
    tensors = get_peft_model_state_dict(peft_model, adapter_name=state.adapter)
    ranks, alphas = {}, {}
    for layer in state.layers:
        index, name = layer.best(retain_ratio), _name_in_peft(layer.name)
        ranks[name] = len(index)
        scaling = layer.module.scaling[state.adapter] * layer.gain
        alphas[name] = _plain(scaling * (math.sqrt(len(index)) if config.use_rslora else len(index)))
        for factor, whole, dim in (("lora_A", layer.whole_A, 0), ("lora_B", layer.whole_B, 1)):
            tensors[f"{layer.name}.{factor}.weight"] = whole.detach().index_select(dim, index)
    # The most common values are the defaults, the others go into patterns.
    config.r, config.lora_alpha = _most_common(ranks), _most_common(alphas)
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    config.inference_mode = True
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: _standalone(tensor) for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(path))
    return ranks


@contextmanager
def retained(model: nn.Module, retain_ratio: float) -> Iterator[None]:
    """Makes ``model`` compute only the components that `save_pruned_checkpoint` would write, in every mode.

    Raises:
        RankError: the ratio is out of range, or the model is not rank-sparse.
    """
    state = _state_of(model, retain_ratio)
    try:
        for layer in state.layers:
            layer.forced = layer.best(retain_ratio)
        yield
    finally:
        for layer in state.layers:
            layer.forced = None


def _state_of(model: nn.Module, retain_ratio: float) -> RankState:
    if isinstance(retain_ratio, bool) or not isinstance(retain_ratio, int | float) or not 0 < retain_ratio <= 1:
        raise RankError(f"retain_ratio must be a number in (0, 1], given {retain_ratio!r}.")
    state = get_rank_state(model)
    if state is None:
        raise RankError("This model is not rank-sparse; call rank.apply(model) first.")
    return state


def _name_in_peft(name: str) -> str:
    """The name that PEFT's patterns match: without the prefix of PEFT's wrappers."""
    return name.removeprefix("base_model.model.")


def _most_common(values: dict[str, float]):
    return Counter(values.values()).most_common(1)[0][0]


def _plain(alpha: float) -> float:
    """``alpha`` as an int where it is whole, as other readers of adapters expect."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _standalone(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with its own memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
