"""Lists removed options, so that a configuration which still uses one gets an error that says why it was removed."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A removed option, or removed values of an option.

    Attributes:
        neutral: the values that had no effect; they are dropped on reading.
        was: what the option did and why it was removed.
        values: the removed values of a key that still exists.
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
"""Removed options by the path of their key in `SparsityConfig`."""

AUTO_WAS_CALIBRATED = (
    "sparsity='auto' was renamed: it chose channels on calibration_samples, which 'calibrated' does now. Set "
    "sparsity='calibrated'; 'auto' leaves out no channels and takes no samples"
)
ONLY_WITH_SAMPLES = (
    "'calibrated' is for get_peft_model(..., sparsity='calibrated', calibration_samples=batches); elsewhere give the "
    "sparsity.yaml of `sparse-unsloth calibrate`"
)


def drop(data: Mapping, prefix: str = "") -> tuple[Mapping, list[str]]:
    """``data`` without the keys of `REMOVED`, and one line for each that had an effect.

    Args:
        data: a mapping of options, possibly nested.
        prefix: the path of ``data``, such as ``"estimator."``.
    """
    kept, problems = {}, []
    for key, value in data.items():
        path = f"{prefix}{key}"
        if path in REMOVED and REMOVED[path].values:
            if isinstance(value, str) and value in REMOVED[path].values:
                problems.append(f"{path}: {REMOVED[path].was} (given {value!r})")
                continue
        elif path in REMOVED:
            if _has_effect(value, REMOVED[path].neutral):
                problems.append(f"{path}: {explanation(path)}; delete the key (given {value!r})")
            continue
        if isinstance(value, Mapping) and any(name.startswith(f"{path}.") for name in REMOVED):
            value, nested = drop(value, f"{path}.")
            problems += nested
        kept[key] = value
    return kept, problems


def _has_effect(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value``, or one inside a mapping such as ``{"mlp": {"all": 0.5}}``, is not neutral."""
    if isinstance(value, Mapping):
        return any(_has_effect(each, neutral) for each in value.values())
    return value not in neutral


def unknown(key: str) -> str:
    """The explanation for an unknown command-line word or recipe key that was an option once, else ""."""
    name = key.replace("-", "_").removeprefix("sparsity.")
    name = "output_sparsity" if name == "output_levels" else name  # of calibrate
    paths = [path for path, gone in REMOVED.items() if not gone.values and (path == name or path.endswith(f".{name}"))]
    return explanation(paths[0]) if paths else ""


def explanation(path: str) -> str:
    """The message for the removed option at ``path``."""
    return f"this option was removed: it {REMOVED[path].was}"
