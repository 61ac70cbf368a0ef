"""Reads the configuration files of the two SparseLoRA releases, so that existing files work unchanged.

* 2025, flat YAML: ``start_step``, ``mode: "svd_8"``, ``skip_output_tokens``, ``sparsity: {layers.3.mlp: 0.99, ...}``.
* 2026, JSON: ``predictor_rank``, ``modes: {o1: {layer_sparsity: {model.layers.3.mlp: 0.99, ...}}, ...}``, or one mode's
  ``layer_sparsity`` at the top, as that release saved it.

A setting that such a file leaves out keeps the default of its release: sparse from the first step to the last (no dense
tail), and in the flat YAML no dense loss tokens.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sparse_unsloth.config import removed
from sparse_unsloth.config.layer_rules import collect, share

_LAYER = re.compile(r"(?:.*\.)?layers\.([0-9]+)\.(mlp|self_attn)")
# ffn_sparsity, qkvo_sparsity and base_model are labels: no release uses them.
_FLAT_KEYS = (
    *("start_step", "end_step", "mode", "skip_output_tokens", "sparse_lora_branch", "sparsity"),
    *("ffn_sparsity", "qkvo_sparsity"),
)
_JSON_KEYS = ("base_model", "predictor_rank", "modes", "layer_sparsity", "path", "start_step", "end_step")


def recognises(data: Mapping) -> bool:
    """Whether ``data`` is in one of the older formats."""
    return "modes" in data or "layer_sparsity" in data or _is_flat(data)


def translate(data: Mapping, mode: str | None, folder: Path | None) -> tuple[dict, list[str]]:
    """The same settings under `SparsityConfig`'s keys, and one line for each problem.

    Args:
        data: contents of a file that `recognises` accepts.
        mode: which of the JSON format's modes to use; needed when it holds several.
        folder: the folder of the file, for factors stored beside it (``model.safetensors``).
    """
    problems: list[str] = []
    if _is_flat(data):
        if mode is not None:
            problems.append(f"mode: {mode!r} asked for, but this file has no modes to choose from")
        return _from_flat(data, problems), problems
    return _from_json(data, mode, folder, problems), problems


def _is_flat(data: Mapping) -> bool:
    layers = data.get("sparsity")
    if not isinstance(layers, Mapping):
        return False
    return "mode" in data or "skip_output_tokens" in data or any(_LAYER.fullmatch(str(key)) for key in layers)


def _from_flat(data: Mapping, problems: list[str]) -> dict:
    _refuse_unknown(data, _FLAT_KEYS, problems)
    layers = _layers("sparsity", data["sparsity"], problems)
    any_sparse = any(value for part in layers.values() for value in part.values())
    if _switch("sparse_lora_branch", data, problems):
        problems.append(f"sparse_lora_branch: {removed.explanation('lora_branch')}; delete the key (given True)")
    return {
        **{part: collect(found) for part, found in layers.items()},
        **_ranking(data.get("mode"), any_sparse, problems),
        **_schedule(data),
        "dense_tokens": "output" if _switch("skip_output_tokens", data, problems) else "none",
    }


def _from_json(data: Mapping, mode: str | None, folder: Path | None, problems: list[str]) -> dict:
    _refuse_unknown(data, _JSON_KEYS, problems)
    rank = data.get("predictor_rank", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"predictor_rank: must be a whole number from 1 up, given {rank!r}")
        rank = 8
    key, table = _chosen_mode(data, mode, problems)
    layers = _layers(key, table, problems)
    factors = None if folder is None else folder / "model.safetensors"
    return {
        **{part: collect(found) for part, found in layers.items()},
        "estimator": {
            "kind": "svd",
            "rank": rank,
            "path": str(factors) if factors is not None and factors.is_file() else None,
        },
        **_schedule(data),
    }


def _chosen_mode(data: Mapping, mode: str | None, problems: list[str]) -> tuple[str, object]:
    """The chosen table of layers, and its key for messages: ``(key, table)``."""
    if "modes" not in data:
        if mode is not None:
            problems.append(f"mode: {mode!r} asked for, but this file has no modes to choose from")
        return "layer_sparsity", data["layer_sparsity"]
    modes = data["modes"]
    if not isinstance(modes, Mapping) or not modes:
        problems.append(f"modes: must be a mapping of names to layer_sparsity, given {modes!r}")
        return "modes", {}
    names = ", ".join(map(str, modes))
    if mode is None and len(modes) > 1:
        problems.append(f"mode: choose one of {names}, as in from_file(path, mode={next(iter(modes))!r})")
        return "modes", {}
    chosen = next(iter(modes)) if mode is None else mode
    if chosen not in modes:
        problems.append(f"mode: must be one of {names}, given {chosen!r}")
        return "modes", {}
    body = modes[chosen]
    if not isinstance(body, Mapping) or set(body) != {"layer_sparsity"}:
        problems.append(f"modes.{chosen}: must be a mapping with the key layer_sparsity only, given {body!r}")
        return "modes", {}
    return f"modes.{chosen}.layer_sparsity", body["layer_sparsity"]


def _layers(key: str, table: object, problems: list[str]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {"mlp": {}, "self_attn": {}}
    if not isinstance(table, Mapping):
        problems.append(f"{key}: must be a mapping such as {{'layers.3.mlp': 0.99}}, given {table!r}")
        return found
    for name, value in table.items():
        match = _LAYER.fullmatch(str(name))
        if match is None:
            problems.append(f"{key}.{name}: must name a module as layers.3.mlp or layers.3.self_attn (given {value!r})")
            continue
        layer, part = int(match[1]), match[2]
        if layer in found[part]:
            problems.append(f"{key}.{name}: names the {part} of layer {layer} a second time")
        try:
            found[part][layer] = share(value)
        except ValueError as error:
            problems.append(f"{key}.{name}: {error}, given {value!r}")
    return found


def _ranking(mode: object, any_sparse: bool, problems: list[str]) -> dict:
    """The estimator or criterion of a 2025 ``mode``: ``svd_8``, ``dense``, or a study such as ``oracle_ffn_wanda``."""
    words = re.findall("[a-z]+|[0-9]+", mode) if isinstance(mode, str) else []
    rank = int(words[-1]) if words and words[-1].isdigit() else 0
    if "svd" in words and rank:
        return {"estimator": {"kind": "svd", "rank": rank}}
    if words in (["dense"], ["none"]):
        if any_sparse:
            problems.append(
                f"mode: {mode!r} contradicts the layers above 0 in sparsity; write 'svd_8', or set them to 0"
            )
        return {"preset": "dense"}
    if "oracle" in words and not {"qk", "vo"} & set(words):
        for word, criterion in (("wanda", "wanda"), ("random", "random"), ("norm", "oracle")):
            if word in words:
                return {"criterion": criterion}
    problems.append(
        "mode: must be 'svd_RANK' (such as 'svd_8'), 'dense', or an 'oracle_...' study of whole layers by norm, wanda "
        f"or random, given {mode!r}"
    )
    return {}


def _schedule(data: Mapping) -> dict:
    """The schedule; both releases read numbers up to 1 as fractions of the training, and larger ones as steps."""
    steps = {"start_step": data.get("start_step", 0.0), "end_step": data.get("end_step", 1.0)}
    for key, value in steps.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            steps[key] = float(value) if value <= 1 else int(value) if float(value).is_integer() else value
    return steps


def _switch(key: str, data: Mapping, problems: list[str]) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        problems.append(f"{key}: must be true or false, given {value!r}")
    return value is True


def _refuse_unknown(data: Mapping, valid: Iterable[str], problems: list[str]) -> None:
    for key in data:
        if key not in valid:
            near = difflib.get_close_matches(str(key), list(valid), n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys of this older format: {', '.join(valid)}"
            problems.append(f"{key}: unknown key; {hint} (given {data[key]!r})")
