"""Defines the compared methods, their backend and sparsity, and their FLOP limits."""

from __future__ import annotations

import re

from sparse_unsloth.bench.shapes import shape_of
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.errors import ConfigError

METHODS = {
    "unsloth-dense": "Unsloth with nothing attached, as the arm padded, in our process",
    "unsloth-dense-exact": "Unsloth, dense, unused rows skipped",
    "dense-graphs": "likewise, layers captured in CUDA graphs",
    "dense-fp8-graphs": "likewise, products with frozen weights in FP8",
    "sparse-o1": "preset o1, conservative",
    "sparse-o2": "preset o2, aggressive",
    "sparse-o2-graphs": "preset o2, layers captured in CUDA graphs",
    "sparse-50": "half of the MLP channels, layer 0 and attention dense",
    "sparse-25": "a quarter of the MLP channels, likewise",
    "rows-25": "exact forward, backward through a quarter of the context tokens",
    "rows-10": "through a tenth of them",
    "rows-25-graphs": "a quarter of them, layers captured in CUDA graphs",
    "rows-10-graphs": "a tenth of them, likewise",
    "rows-25-fp8-graphs": "rows-25-graphs, products with frozen weights in FP8",
    "nothing-dropped": "the sparse path with every channel kept",
    "peft-dense": "plain transformers and PEFT, in a process without Unsloth",
    "peft-sparse-o2": "preset o2 through the PEFT backend, likewise",
}
DENSE = "dense"
"""Names the methods ``*-dense-exact`` on a command line, by its backend."""
BASELINE = "unsloth-dense"
PLAIN = ("unsloth-dense", "peft-dense")
"""Methods that attach nothing."""
EQUAL_TO_PLAIN = ("dense-exact", "dense-graphs", "nothing-dropped")
"""Methods that must compute what the plain model computes, without their backend."""
NEAR_PLAIN = ("dense-fp8-graphs",)
"""Methods that do so up to FP8's rounding (`sparse_unsloth.bench.checks.FP8_TOLERANCE`)."""
OURS = ("dense-exact", *(name for name in METHODS if not name.startswith(("unsloth-", "peft-"))))
"""Methods that attach something, without their backend: through the PEFT backend their names begin with ``peft-``."""

LLAMA_3_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
TARGETS = {
    ("math10k", "sparse-o2"): (2.1, 2.50),
    ("codefeedback", "sparse-o2"): (1.45, 1.66),
    ("wizardlm", "sparse-o2"): (2.0, 2.41),
    ("csr170k", "sparse-o2"): (3.6, 4.89),
    ("long8k", "sparse-o2"): (2.1, 2.62),
    ("long16k", "sparse-o2"): (1.9, 2.43),
    ("wizardlm", "sparse-50"): (1.35, 1.51),
    ("wizardlm", "sparse-25"): (1.6, 1.89),
}
TARGETS |= {(shape, "sparse-o2-graphs"): target for (shape, method), target in TARGETS.items() if method == "sparse-o2"}
"""``(target, FLOP limit)`` of the speed-up over dense Unsloth on Llama-3-8B, as the project states them."""


def methods_of(names: str, backend: str = "unsloth") -> list[str]:
    """Returns methods from names separated by commas.

    Args:
        backend: of names that tell none; ``dense`` is ``unsloth-dense-exact`` or ``peft-dense-exact``.

    Raises:
        ConfigError: a name is unknown.
    """
    chosen = [_with_backend(name, backend) for name in names.split(",")]
    if unknown := [name for name in chosen if name not in METHODS and name not in map("peft-{}".format, OURS)]:
        raise ConfigError(
            f"there is no method {', '.join(unknown)}; methods are {', '.join(METHODS)}, {DENSE}, and peft- before "
            f"{', '.join(OURS)}"
        )
    return list(dict.fromkeys(chosen))


def _with_backend(name: str, backend: str) -> str:
    if name == DENSE:
        return f"{backend}-dense-exact"
    return f"peft-{name}" if backend == "peft" and not name.startswith(("unsloth-", "peft-")) else name


def backend_of(method: str) -> str:
    """Returns "unsloth" or "peft"."""
    return "peft" if method.startswith("peft-") else "unsloth"


def without_backend(method: str) -> str:
    """Returns the method's name in `OURS`, or "dense" for one that attaches nothing."""
    return method.removeprefix("unsloth-").removeprefix("peft-")


def sparsity_of(method: str, num_layers: int, estimator: str | None = None) -> dict | None:
    """Returns the configuration of a method; None for a method that attaches nothing.

    Args:
        estimator: a file that stores the factors for the next attach.
    """
    common = {"start_step": 0, "end_step": 1.0, "estimator": {"kind": "svd", "rank": 8, "path": estimator}}
    if method in PLAIN:
        return None
    method = without_backend(method)
    if method == "dense-exact":
        return {"preset": "dense"}
    if method == "dense-graphs":
        return {"preset": "dense", "cuda_graphs": True}
    if method == "dense-fp8-graphs":
        return {"preset": "dense", "precision": "fp8", "cuda_graphs": True}
    if kept := re.match(r"rows-(\d\d)", method):
        precision = {"precision": "fp8"} if "-fp8" in method else {}
        return {"backward_rows": int(kept[1]) / 100, "cuda_graphs": method.endswith("-graphs"), **precision}
    if kept := re.match(r"sparse-(\d\d)", method):
        return {"mlp": {f"1-{num_layers - 1}": 1 - int(kept[1]) / 100}, **common}
    if method == "sparse-o2-graphs":
        return {**common, "preset": "o2", "cuda_graphs": True}
    if method == "nothing-dropped":
        return {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}, **common}
    return {"preset": method[-2:], **common}


def flop_limit(
    shape_name: str, method: str, model: ModelShape, checkpointing: bool = True, base_checkpointing: bool | None = None
) -> float:
    """Returns the speed-up over dense Unsloth that the FLOPs allow: that of `TARGETS`, else counted.

    Args:
        checkpointing: of the method; ``base_checkpointing`` of dense Unsloth, None: the same.

    Unused rows are skipped (docs/how-it-works.md, section 5), with the PEFT backend those of 5.3 alone. The limits in
    `TARGETS` weigh attention a little less than `step_flops`. FLOPs in FP8 count like others, though a GPU computes
    more of them a second: methods in FP8 can be above their limit.
    """
    base_checkpointing = checkpointing if base_checkpointing is None else base_checkpointing
    if checkpointing and base_checkpointing and model == LLAMA_3_8B and (shape_name, method) in TARGETS:
        return TARGETS[shape_name, method][1]
    shape = shape_of(shape_name)
    config = SparsityConfig.from_any(sparsity_of(method, model.num_layers) or "dense")
    loss = shape.batch * shape.outputs if backend_of(method) == "unsloth" and method != BASELINE else None

    def flops(layers: list[tuple[float, float]], checkpointing: bool, **others: float | None) -> int:
        rows = shape.tokens - shape.context_tokens, shape.context_tokens
        lengths = [shape.length] * shape.batch
        step = TrainingStep(*rows, lengths, lora_rank=16, checkpointing=checkpointing, **others)
        return step_flops(model, layers, step).total

    return flops([(0.0, 0.0)] * model.num_layers, base_checkpointing) / flops(
        config.layer_sparsity(model.num_layers),
        checkpointing,
        backward_rows=config.backward_rows,
        head_tokens=loss,
        last_layer_tokens=loss,
    )
