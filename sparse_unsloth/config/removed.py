"""Options that older configurations may name: a value that asks for what is gone is an error that says why."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Removed(NamedTuple):
    """``neutral``: the values that asked for nothing, and are dropped on reading; ``was``: what it was, why it went.

    With ``values`` the key is still there, and these values of it are gone.
    """

    neutral: tuple[Any, ...]
    was: str
    values: tuple[Any, ...] = ()


REMOVED: dict[str, Removed] = {
    "ramp": Removed(
        (0,),
        "let sparsity fall linearly before end_step. No recipe used it and no measurement favoured it, and every step "
        "had other shapes, so that CUDA graphs could not replay them (benchmarks/results/quality-notes.md)",
    ),
    "refresh_steps": Removed(
        (1,),
        "kept a layer's channels for several optimiser steps. 93 % of the channels stay the same anyway, no time "
        "was ever shown to be saved, and such layers could not be CUDA graphs (benchmarks/results/quality-notes.md)",
    ),
    "lora_branch": Removed(
        ("dense",),
        "let context rows leave out the LoRA branch of unselected channels as well. No recipe used it and it was never "
        "measured; the branch is always computed in full (benchmarks/results/quality-notes.md)",
    ),
    "estimator.compensation_rank": Removed(
        (0,),
        "added a low-rank stand-in for the dropped channels. It lost to a shorter dense run of the same cost, and its "
        "layers could not be CUDA graphs (benchmarks/results/quality.md, comp-50 and comp-25-no-tail)",
    ),
    "output_sparsity": Removed(
        (0, None),
        "left channels out for output tokens too. It cost quality and saved little, and its layers ran part by part, "
        "without CUDA graphs (benchmarks/results/quality-notes.md)",
    ),
    "rope_pairs": Removed(
        (True,),
        "chose query and key channels one by one when it was false. That was an ablation; they are always chosen as "
        "rotary pairs (d, d + head_dim / 2), which the rotation mixes",
    ),
    "estimator.kind": Removed(
        (),
        "'whitened' and 'static' were removed: 'prior', which combines both, captures more energy at the same cost "
        "(figures in sparse_unsloth/channels/factors.py); set 'prior'",
        values=("whitened", "static"),
    ),
}
"""By the path of the key in `SparsityConfig`."""


def drop(data: Mapping, prefix: str = "") -> tuple[Mapping, list[str]]:
    """``data`` without the keys of `REMOVED`, and one line for each that asked for more than its neutral value.

    Args:
        data: a mapping of options, with its nested ones.
        prefix: its own path, such as ``"estimator."``.
    """
    kept, problems = {}, []
    for key, value in data.items():
        path = f"{prefix}{key}"
        if path in REMOVED and REMOVED[path].values:
            if isinstance(value, str) and value in REMOVED[path].values:
                problems.append(f"{path}: {REMOVED[path].was} (given {value!r})")
                continue
        elif path in REMOVED:
            if _asks(value, REMOVED[path].neutral):
                problems.append(f"{path}: {said(path)}; delete the key (given {value!r})")
            continue
        if isinstance(value, Mapping) and any(name.startswith(f"{path}.") for name in REMOVED):
            value, nested = drop(value, f"{path}.")
            problems += nested
        kept[key] = value
    return kept, problems


def _asks(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value, or one inside a mapping such as ``{"mlp": {"all": 0.5}}``, is another than the neutral ones."""
    if isinstance(value, Mapping):
        return any(_asks(each, neutral) for each in value.values())
    return value not in neutral


def unknown(key: str) -> str:
    """What is said of an unknown command-line word or recipe key that was an option once, else ""."""
    name = key.replace("-", "_").removeprefix("sparsity.")
    name = "output_sparsity" if name == "output_levels" else name  # of calibrate
    paths = [path for path, gone in REMOVED.items() if not gone.values and (path == name or path.endswith(f".{name}"))]
    return said(paths[0]) if paths else ""


def said(path: str) -> str:
    return f"this option was removed: it {REMOVED[path].was}"
