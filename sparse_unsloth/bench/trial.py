"""Tries every mode of training on small random models, with the libraries and the device that are installed.

`sparse-unsloth doctor` runs it for one family, ``tests/gpu/acceptance.py`` for all. It is a script, because Unsloth
patches its process permanently:

    python -m sparse_unsloth.bench.trial --backend unsloth --families llama,qwen3 --dtypes 4bit --checkpointing unsloth

Each mode is tried twice. With nothing left out it must give the loss and the gradients of the same model before
anything was attached. With its usual sparsity it must train. Each trial is a JSON object in ``--out``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import Uncompiled
from sparse_unsloth.bench.chosen_rows import TrialError, noted_rows
from sparse_unsloth.bench.families import FAMILIES, families_of, write_models
from sparse_unsloth.bench.models import CHECKPOINTING
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.ops.dispatch import VARIABLE
from sparse_unsloth.runtime import checkpoint_planner
from sparse_unsloth.runtime.attach_report import AttachReport

ALMOST_NOTHING = 1e-9
"""A sparsity, or a share of rows left out, at which every channel and every row is kept."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE, OF_EACH_LAYER = 2e-3, 0.03, 0.004
"""Allowed relative differences between two orders of bf16 arithmetic: of the loss; and of all gradients together, the
larger of a constant and so much a layer. Measured on an H200: 0.012 with 4 small layers, 0.105 with the 32 of
Llama-3-8B, where Unsloth's own layers, compiled and not, are 0.067 apart."""
LEAST_COSINE = 0.5
"""The least cosine of a gradient through chosen rows with the dense one; random rows of random models give less."""
ROWS_TOLERANCE = 2
"""Allowed of a gradient through chosen rows, against the same rows by the model's own code: so many times the tolerance
of all gradients. An estimate: not measured on a GPU yet."""
DROP = 0.05
"""The share by which one step down the gradient lowers the loss, to first order."""
LAYOUTS = {
    "padded": ((200, 150), (256, 200), (131, 100), (256, 255)),
    "padding-free": ((200, 150), (256, 200), (131, 100), (256, 255)),
    "packed": ((64, 40), (90, 12), (33, 20), (127, 100), (80, 60), (120, 119), (200, 30), (129, 99)),
}
"""``(tokens, tokens of the prompt)`` of the documents of a micro-batch."""
CHANNELS = {"estimator": {"kind": "svd"}, "start_step": 0, "end_step": 1.0}
MODES = {
    "dense": ({"preset": "dense"}, {"preset": "dense"}),
    "rows": ({"backward_rows": 1 - ALMOST_NOTHING}, {"backward_rows": 0.25}),
    "channels": (
        {"mlp": {"all": ALMOST_NOTHING}, "self_attn": {"all": ALMOST_NOTHING}, **CHANNELS},
        {"mlp": {"1-3": 0.75}, "self_attn": {"2-3": 0.5}, **CHANNELS},
    ),
}
MODES |= {f"{mode} graphs": tuple({**one, "cuda_graphs": True} for one in pair) for mode, pair in MODES.items()}
"""By mode: the configuration with nothing left out, and the one that is used."""

DTYPES = "bf16", "4bit"
"""Of the base weights."""
TUNING = "max_autotune", "shape_padding"
"""The options of `torch.compile` that time kernels."""
TRIED = "families", "dtypes", "checkpointing", "layouts", "modes"
"""The options whose values are combined."""

Step = tuple[float, dict[str, Tensor]]
"""Loss, and gradients by the parameter's name."""


@dataclass(frozen=True)
class Trial:
    """The result of one mode of one model.

    Attributes:
        verdict: "ok"; "refused" where attaching refused with a reason; "failed" where the mode or the plain model is
            wrong.
        layers, whole, captured: the numbers of decoder layers, of whole layers, and of captured layers.
        detail: the reasons or the error.
        gradient_error: relative, of all gradients with nothing left out, against the model before attaching.
        attention_kept: the number of checkpointed layers that keep attention (``--keep-attention``).
        rows_error: of the gradient through chosen rows, against the same rows by the model's own code; None where the
            mode is not "rows".
        seconds: of the trial.
    """

    backend: str
    family: str
    dtype: str
    checkpointing: str
    layout: str
    mode: str
    verdict: Literal["ok", "refused", "failed"] = "ok"
    layers: int = 0
    whole: int = 0
    captured: int = 0
    attention_kept: int = 0
    detail: str = ""
    gradient_error: float | None = None
    rows_error: float | None = None
    seconds: float = 0.0


def make_batch(
    layout: str, vocab_size: int, device: torch.device, backend: str, documents: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Makes a micro-batch: right-padded, or one sequence as TRL sends it (under Unsloth with lengths).

    Args:
        documents: ``(tokens, tokens of the prompt)`` of each; default: those of `LAYOUTS`.
    """
    documents = documents or LAYOUTS[layout]
    lengths = torch.tensor([length for length, _ in documents])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (len(documents), int(lengths.max())), generator=generator)
    positions = torch.arange(ids.shape[1])
    mask = positions < lengths[:, None]
    ids = torch.where(mask, ids, 2)
    prompts = torch.tensor([prompt for _, prompt in documents])
    labels = torch.where(mask & (positions >= prompts[:, None]), ids, -100)
    if layout == "padded":
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
    else:
        batch = {
            "input_ids": ids[mask][None],
            "labels": labels[mask][None],
            "position_ids": positions.expand(ids.shape)[mask][None],
        }
        if backend == "unsloth":
            batch["packed_seq_lengths"] = lengths.int()
    return {name: value.to(device) for name, value in batch.items()} | {"use_cache": False}


def load(
    backend: str, folder: Path, dtype: str, checkpointing: bool | str, attention: str = "", sparsity: str = "dense"
) -> nn.Module:
    """Loads the checkpoint with LoRA of rank 8 that is not zero, ready to train, nothing attached.

    Args:
        folder: of the checkpoint, named after its family.
        attention: its implementation; "" is the family's, or the library's default.
        sparsity: attached once and taken off again; "rows" for families that nothing else can be attached to.
    """
    from sparse_unsloth import FastSparseLanguageModel, detach

    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    attention = attention or (FAMILIES[folder.name].attention if backend == "peft" else "")
    model, _ = FastSparseLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=1024,
        dtype=half,
        load_in_4bit=dtype == "4bit",
        backend=backend,
        use_gradient_checkpointing=checkpointing,
        **({"attn_implementation": attention} if attention else {}),
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, use_gradient_checkpointing=checkpointing, random_state=0, sparsity=sparsity
    )
    detach(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(value.to(parameter.device, parameter.dtype))
    return FastSparseLanguageModel.for_training(model, checkpointing)


def step(model: nn.Module, batch: dict[str, Any]) -> Step:
    """Runs one forward and backward, in bf16 autocast on a GPU, as trainers do."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        loss = model(**batch).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise TrialError(f"{name} got no gradient")
            gradients[name] = parameter.grad.float().clone()
    return loss.detach().float().item(), gradients


def plain_step(model: nn.Module, batch: dict[str, Any]) -> tuple[Step, str]:
    """Runs a step with nothing attached; returns its problems too.

    Where Unsloth's compiled layers fail by themselves, they run uncompiled from then on, as users would have to run
    them (``UNSLOTH_BLOCK_COMPILE=0``).
    """
    try:
        return step(model, batch), ""
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        for layer in find_layers(model):
            Uncompiled(layer.module)
        found = f"Unsloth's compiled layers fail without sparse_unsloth ({type(error).__name__}: {first}), so all run "
        return step(model, batch), found + "uncompiled here"


def try_mode(model: nn.Module, batch: dict[str, Any], mode: str, plain: Step, trial: Trial) -> Trial:
    """Tries the mode that ``trial`` describes, and returns it with the result; the model is restored afterwards.

    Args:
        plain: a step of the model with nothing attached, on the same batch.
    """
    from sparse_unsloth import detach, get_state

    began = time.perf_counter()
    exact, used = MODES[mode]
    steps = RUNS_BEFORE_CAPTURE + 2 if mode.endswith("graphs") else 1
    try:
        report = _attach(model, batch, exact)
        for _ in range(steps):
            ours = step(model, batch)
        depth = len(report.layers)
        error = _compare(ours, plain, "with nothing left out", depth)
        trial = replace(trial, gradient_error=error)
        detach(model)
        report = _attach(model, batch, used)
        chosen: list[Tensor] = []
        with noted_rows(chosen):
            for _ in range(steps):
                ours = step(model, batch)
        _check(ours, plain, mode, depth)
        if mode == "rows":  # a captured pass chooses its rows in a graph
            trial = replace(trial, rows_error=_check_rows(model, batch, ours, chosen, depth))
        _check_descent(model, batch, ours)
        reasons = [f"{count} layers: {reason}" for reason, count in (*report.not_whole, *report.not_captured)]
        graphs, captured = get_state(model).graphs, report.captured_layers
        if graphs is not None and graphs.unused:
            captured = 0
            reasons.append("nothing was captured")
        trial = replace(
            trial,
            layers=len(report.layers),
            whole=report.whole_layers,
            captured=captured,
            attention_kept=0 if get_state(model).planner is None else len(get_state(model).planner.attention_kept),
            detail="; ".join(dict.fromkeys(reasons)),
        )
    except AttachError as error:
        trial = replace(trial, verdict="refused", detail=str(error))
    except Exception as error:
        trial = replace(trial, verdict="failed", detail=f"{type(error).__name__}: {error}"[:2000])
    finally:
        if get_state(model) is not None:
            detach(model)
    return replace(trial, seconds=round(time.perf_counter() - began, 2))


def keep_attention_alone() -> None:
    """Lets layers keep attention in this process from now on, of documents of any length, and nothing else."""
    checkpoint_planner.KEEPS_ATTENTION, checkpoint_planner.LEAST_ATTENTION = True, 0.0
    checkpoint_planner.CheckpointPlanner._needs = lambda *given: [math.inf]


def _attach(model: nn.Module, batch: dict[str, Any], sparsity: dict[str, Any]) -> AttachReport:
    """Attaches; where layers may keep attention, with a planner, and a step that shows which run as a whole."""
    from sparse_unsloth import attach, get_state

    if not checkpoint_planner.KEEPS_ATTENTION:
        return attach(model, sparsity)
    budget = 0.9 if torch.cuda.is_available() else 64
    report, state = attach(model, {**sparsity, "memory_budget": budget}), get_state(model)
    state.begin_training("trial", max_steps=1_000_000)
    state.set_step(0)
    step(model, batch)
    return report


def _compare(ours: Step, plain: Step, what: str, depth: int, times: float = 1) -> float:
    """Returns the relative error of all gradients together; allowed is so many ``times`` the tolerance."""
    if not math.isclose(ours[0], plain[0], rel_tol=LOSS_TOLERANCE):
        raise TrialError(f"{what} the loss is {ours[0]:.5f} instead of {plain[0]:.5f}")
    apart = sum((ours[1][name] - plain[1][name]).square().sum() for name in plain[1])
    error = (apart / sum(values.square().sum() for values in plain[1].values())).sqrt().item()
    if not error <= times * max(GRADIENT_TOLERANCE, OF_EACH_LAYER * depth):
        raise TrialError(f"{what} the gradients are {error:.3g} (relative) off")
    return error


def _check(ours: Step, plain: Step, mode: str, depth: int) -> None:
    """Checks that a mode with its usual sparsity leaves out what it should, and not more."""
    if mode.startswith("dense"):
        _compare(ours, plain, "dense,", depth)
        return
    if mode.startswith("rows"):
        if not math.isclose(ours[0], plain[0], rel_tol=LOSS_TOLERANCE):
            raise TrialError(f"the forward is not exact: the loss is {ours[0]:.5f} instead of {plain[0]:.5f}")
    elif ours[0] == plain[0]:
        raise TrialError("no channel was left out: the loss is that of the dense model")
    dot, norms = 0.0, [0.0, 0.0]
    for name, expected in plain[1].items():
        dot += (ours[1][name] * expected).sum().item()
        for place, values in enumerate((ours[1][name], expected)):
            norms[place] += values.square().sum().item()
    cosine = dot / math.sqrt(norms[0] * norms[1])
    if not cosine >= (LEAST_COSINE if mode.startswith("rows") else 0.0):
        raise TrialError(f"the gradient's cosine with the dense one is {cosine:.3f}")


def _check_rows(model: nn.Module, batch: dict[str, Any], ours: Step, chosen: list[Tensor], depth: int) -> float:
    """Compares a gradient through ``chosen`` rows with that of the model's own code, which hooks take part by part.

    Returns:
        The relative error.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "torch"
    try:
        with noted_rows(list(chosen)) as seen:
            by_parts = step(model, batch)
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
    if len(seen) != len(chosen):
        raise TrialError(f"{len(chosen)} layers chose rows, and by the model's own code {len(seen)} did")
    return _compare(ours, by_parts, "through the same rows by the model's own code", depth, ROWS_TOLERANCE)


def _check_descent(model: nn.Module, batch: dict[str, Any], ours: Step) -> None:
    """Checks that a small step down the gradient lowers the loss, so that changed weights are read; then undoes it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    rate = DROP * ours[0] / sum(gradient.square().sum() for gradient in ours[1].values())
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.sub_((rate * ours[1][name]).to(parameter.dtype))
    loss, _ = step(model, batch)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    if not loss < ours[0]:
        raise TrialError(f"a step down the gradient takes the loss from {ours[0]:.5f} to {loss:.5f}")


def try_all(args: argparse.Namespace) -> Iterator[Trial]:
    """Yields the trials of one process, ``args`` from `parse`; of each layout first "plain", with nothing attached."""
    for family in args.families:
        for (dtype, word), kinds in itertools.groupby(combinations(args), lambda kind: kind[:2]):
            described, began = Trial(args.backend, family, dtype, word, "", "plain"), time.perf_counter()
            try:
                model = load(args.backend, args.models / family, dtype, CHECKPOINTING[word], args.attention)
            except Exception as error:
                yield replace(described, verdict="failed", detail=f"{type(error).__name__}: {error}"[:2000])
                continue
            device = next(model.parameters()).device
            for *_, layout in kinds:
                described = replace(described, layout=layout)
                batch = make_batch(layout, model.config.vocab_size, device, args.backend)
                try:
                    plain, found = plain_step(model, batch)
                except Exception as error:
                    detail = f"without sparse_unsloth: {type(error).__name__}: {error}"
                    yield replace(described, verdict="failed", detail=detail[:2000])
                    continue
                yield replace(described, detail=found, seconds=round(time.perf_counter() - began, 2))
                for mode in args.modes:
                    yield try_mode(model, batch, mode, plain, replace(described, mode=mode))
                began = time.perf_counter()
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def combinations(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """The combinations of dtype, checkpointing and layout that a process tries, in its order."""
    places = itertools.product(args.dtypes, *map(enumerate, (args.checkpointing, args.layouts)))
    return [
        (dtype, word, layout)
        for dtype, (row, word), (column, layout) in places
        if not (args.every_other and (DTYPES.index(dtype) + row + column) % 2)
    ]


def compile_untuned() -> None:
    """Makes `torch.compile` take each kernel's first configuration, and products unpadded, from now on: no tuning.

    Unsloth tunes Gemma 2's attention for minutes; a trial compares results, not times.
    """
    compile_tuned = torch.compile

    def compile(*args: Any, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
        if options:
            options = {name: value if name not in TUNING else False for name, value in options.items()}
        return compile_tuned(*args, options=options, **keywords)

    torch.compile = compile


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments; ``families`` and what each is tried with are lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("unsloth", "peft"), required=True)
    parser.add_argument(
        "--models", type=Path, required=True, help="folder with a checkpoint for each family; made where missing"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--families", help="default: all that the backend is tried with")
    parser.add_argument("--checkpointing", help="default: True,False; before them unsloth with the Unsloth backend")
    parser.add_argument("--attention", default="", help="implementation of attention; default: the family's")
    for name, values in (("dtypes", DTYPES), ("layouts", LAYOUTS), ("modes", MODES)):
        parser.add_argument(f"--{name}", default=",".join(values), help="default: %(default)s")
    half = "only every other combination of dtype, checkpointing and layout: any two of their values meet"
    parser.add_argument("--every-other", action="store_true", help=half)
    parser.add_argument("--keep-attention", action="store_true", help="checkpointed layers keep attention")
    args = parser.parse_args(arguments)
    args.families = args.families or ",".join(families_of(args.backend))
    args.checkpointing = args.checkpointing or ("unsloth," if args.backend == "unsloth" else "") + "True,False"
    if args.out.is_dir():
        parser.error(f"--out: {args.out} is a folder, and must be a file")
    known = {"families": FAMILIES, "dtypes": DTYPES, "checkpointing": CHECKPOINTING, "layouts": LAYOUTS, "modes": MODES}
    for name in TRIED:
        setattr(args, name, getattr(args, name).split(","))
        if unknown := [value for value in getattr(args, name) if value not in known[name]]:
            parser.error(f"--{name}: there is no {', '.join(map(repr, unknown))}; there are {', '.join(known[name])}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trials; returns 1 if one failed, else 0."""
    args = parse(arguments)
    if args.keep_attention:
        keep_attention_alone()
    missing = [family for family in args.families if not (args.models / family / "config.json").is_file()]
    write_models(args.models, missing, args.backend)
    failed = False
    with args.out.open("a") as lines:
        for trial in try_all(args):
            failed |= trial.verdict == "failed"
            lines.write(json.dumps(asdict(trial)) + "\n")
            lines.flush()
            words = (trial.family, trial.dtype, trial.checkpointing, trial.layout, trial.mode, trial.verdict)
            print(*words, f"{trial.whole}/{trial.captured} of {trial.layers}", trial.detail[:300], flush=True)
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    compile_untuned()
    sys.exit(main())
