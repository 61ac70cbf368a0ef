"""Tries row sparsity on tiny random models of every family, and writes docs/models.md.

``python tests/helpers/model_table.py [family ...]`` prints the table; with ``--write`` it is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.errors import AttachError

from decoder_models import FAMILIES, make_batch, make_model
from tiny_models import loras

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TESTED = (
    "mixtral", "gpt_oss", "qwen3_next", "qwen3_5_vl", "phi3", "glm4_moe", "gemma4", "deepseek_v3", "falcon_h1", "mllama"
)  # fmt: skip
"""The families of the test suite."""
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
EVERY_ROW, QUARTER = {"backward_rows": 1 - 1e-9}, {"backward_rows": 0.25}
CHANNELS = {"mlp": {"all": 0.5}, "estimator": {"kind": "svd"}, "start_step": 0, "end_step": 1.0}
LLAMAS = "Llama's"
HEAD = """# Models

Decoder layers of any kind train with row sparsity (`sparsity="rows"`): the layers of the Llama kind by our functions
([how-it-works.md](how-it-works.md#s7)), all others by the model's own code, part by part. Attaching finds the parts in
a forward of ten tokens, proves each, and reports "n of m layers" and what stays dense. This table is generated:
`python tests/helpers/model_table.py --write`.

- **rows**: layers with row sparsity, of all layers of the text decoder, and the parts of a layer that backward takes
  through chosen rows ("Llama's": the MLP and the O projection).
- **channels**: layers that channel sparsity of the MLP computes. "-": refused, with the reason.
- **whole layers**: layers that our functions compute as a whole on a GPU, which CUDA graphs need.
- **every row kept**: the largest relative difference of the loss and of LoRA's gradient from plain PEFT's, without
  gradient checkpointing and with both kinds.
- **quarter**: the cosine of the gradient with a quarter of the context tokens kept, at random weights.

Each model is tiny and random, in float64 on a CPU with the PEFT backend, with LoRA on every linear layer (and on
experts), right-padded prompts and answers, and with an image where the family has "images". Nothing here says how
useful a quarter of the rows is for a trained model of that family, nor how fast it is. Which families ran on Unsloth's
compiled path: [unsloth.md](unsloth.md).

| family | class | rows | parts | channels | whole layers | every row kept | quarter |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Result:
    """What trying a family gave.

    Attributes:
        rows, layers: layers with row sparsity, and all.
        parts: their row parts, and `LLAMAS` for layers of the Llama kind.
        error: the largest relative difference from plain PEFT with every row kept.
        cosine: of the gradient with a quarter of the context tokens.
        channels, whole: the number of layers that channels and whole layers compute; None: not tried.
        problems: what is wrong.
    """

    rows: int = 0
    layers: int = 0
    parts: tuple[str, ...] = ()
    error: float = 0.0
    cosine: float = 0.0
    channels: int | None = None
    whole: int | None = None
    problems: list[str] = field(default_factory=list)


def problems_of(family: str) -> Result:
    """Compares row sparsity with plain PEFT: every row kept, and a quarter, under checkpointing of each kind."""
    result = Result()
    model, batch = make_model(family), make_batch(family)
    plain = {kind: _train(model, batch, kind) for kind in CHECKPOINTING}
    try:
        report = attach(model, EVERY_ROW)
    except AttachError as error:
        result.problems.append(f"refused: {error}")
        return result
    result.rows, result.layers = report.num_sparse, report.num_layers
    parts = dict.fromkeys(part for layer in report.layers for part in layer.row_parts or (LLAMAS,))
    result.parts = tuple(sorted(parts, key=LLAMAS.__eq__))
    for kind, (loss, gradient) in plain.items():
        ours = _train(model, batch, kind)
        get_state(model).verify_step()
        error = max(_apart(ours[0], loss), _apart(ours[1], gradient))
        result.error = max(result.error, error)
        if not error <= FAMILIES[family].tolerance:
            result.problems.append(f"{kind}: every row kept, and {error:.1g} from plain PEFT")
    detach(model)
    attach(model, QUARTER)
    for kind, (loss, gradient) in plain.items():
        ours = _train(model, batch, kind)
        cosine = torch.cosine_similarity(ours[1], gradient, dim=0).item()
        result.cosine = cosine if kind == "none" else result.cosine
        if not (_apart(ours[0], loss) <= FAMILIES[family].tolerance and 0 < cosine < 1 - 1e-6):
            result.problems.append(f"{kind}: a quarter of the rows, and the cosine is {cosine:.3f}")
    detach(model)
    return result


def _train(model: nn.Module, batch: dict[str, torch.Tensor], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one step."""
    model.gradient_checkpointing_disable()
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[kind]})
        model.enable_input_require_grads()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in loras(model).values()]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in found])


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    apart = (found - expected).norm() / expected.norm()
    return apart.item() if torch.isfinite(found).all() else float("inf")


def with_other_methods(family: str, result: Result) -> Result:
    """Adds on how many layers channels and whole layers work."""
    model = make_model(family, torch.float32)
    try:
        result.channels = attach(model, CHANNELS).num_sparse
        detach(model)
    except AttachError:
        result.channels = 0
    with mock.patch.dict(os.environ, {"SPARSE_UNSLOTH_KERNELS": "triton"}):
        result.whole = attach(model, EVERY_ROW).whole_layers
    return result


def table(results: dict[str, Result]) -> Iterable[str]:
    """The lines of the table."""
    for family, result in results.items():
        kind = FAMILIES[family]
        parts = ", ".join(part if part == LLAMAS else f"`{part}`" for part in result.parts)
        wrong = "; ".join(result.problems)
        name = f"{kind.name}{', images' if kind.inputs else ''}"
        counts = [f"{count} of {result.layers}" if count else "-" for count in (result.channels, result.whole)]
        yield (
            f"| {family} | {name} | {result.rows} of {result.layers} | {parts} | {counts[0]} | {counts[1]} | "
            f"{wrong or f'{result.error:.0e}'} | {result.cosine:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/models.md, of all families")
    options = parser.parse_args()
    results = {}
    for family in FAMILIES if options.write else options.families:
        result = problems_of(family)
        results[family] = with_other_methods(family, result) if result.rows else result
        print(*table({family: results[family]}), file=sys.stderr)
    page = HEAD + "\n".join(table(results)) + "\n"
    PAGE.write_text(page, encoding="utf-8") if options.write else print(page)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main()
