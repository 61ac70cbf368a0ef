"""Measures second moments of the inputs of a model's linear layers, and whitens weights by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_unsloth.reporting.tables import StudyError
from sparse_unsloth.utils.unreadable import text_of

MAX_TOKENS = 512


def read_texts(path: Path, count: int) -> list[str]:
    """Reads the first ``count`` texts of a .jsonl file (key "text") or of a .txt file (a text per line).

    Raises:
        StudyError: there is no such file, it is no text, a line has no text, or the file has no text.
    """
    if not path.is_file():
        raise StudyError(f"calibration text: there is no file {path}.")
    lines = [line for line in text_of(path, StudyError).splitlines() if line.strip()][:count]
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["text"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f'{path}: every line must be an object with a "text": {error!r}') from None
    if not lines:
        raise StudyError(f"{path}: holds no text.")
    return lines


@torch.no_grad()
def input_moments(folder: Path, names: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
    """Computes ``X' X / N`` (fp32 ``[in, in]``) of the inputs ``X [N, in]`` of the named layers over ``texts``.

    The whole model is loaded. Each text is one batch, cut at `MAX_TOKENS` tokens. Every layer keeps a matrix, so limit
    the layers of a large model.

    Raises:
        StudyError: the model has no ``nn.Linear`` of that name (a tied ``lm_head`` is not stored, for one).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    modules = dict(model.named_modules())
    absent = [name for name in names if not isinstance(modules.get(name), nn.Linear)]
    if absent:
        raise StudyError(f"whitened spectra: the model has no linear module {absent[0]} ({len(absent)} such names).")
    sums: dict[str, Tensor] = {}
    tokens = 0

    def collect(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            rows = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + rows.t() @ rows

        return hook

    handles = [modules[name].register_forward_pre_hook(collect(name)) for name in names]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)["input_ids"]
        if ids.numel():
            model(input_ids=ids)
            tokens += ids.numel()
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def whiten(weight: Tensor, moment: Tensor) -> Tensor:
    """Returns ``W S^½`` with ``S = moment``: its Frobenius norm is that of the layer's output, per token."""
    variances, directions = torch.linalg.eigh(moment.double())
    root = (directions * variances.clamp_min(0).sqrt()) @ directions.t()
    return weight @ root.to(weight)
