"""Runs the quickstart: trains a small model dense, sparse, and dense at the sparse run's cost; or on a GPU stock and
with `auto`."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from sparse_unsloth.attachment import detach, get_state
from sparse_unsloth.costs.flops import ATTENTION, MLP, ModelShape, TrainingStep, step_flops
from sparse_unsloth.errors import DataError
from sparse_unsloth.quickstart.pairs import Pairs
from sparse_unsloth.quickstart.report import save_report, terminal_table
from sparse_unsloth.quickstart.turns import StepInTurns, Turns
from sparse_unsloth.tokens.batch import Batch, read_batch
from sparse_unsloth.tokens.partition import TokenPartition
from sparse_unsloth.training.recipe import Recipe, load_recipe
from sparse_unsloth.training.requirements import check_can_train
from sparse_unsloth.training.run import build_trainer
from sparse_unsloth.utils.environment import environment
from sparse_unsloth.utils.faults import SetUp, check_output

RECIPE = "quickstart"
# TRL 1.14 computes logits in chunks of this many rows, and again in the backward pass.
HEAD_CHUNK = 256
# Samples of a batch of the calibration.
CALIBRATION_BATCH = 8
OWN_FILES = ("adapter", "recipe.yaml", "checkpoint-*", "explain*", "estimator.safetensors", "README.md", "runs")
"""The files that a run of the quickstart writes to its folder."""
DENSE, SPARSE, EQUAL = "dense", "sparse", "dense, equal cost"
STOCK, AUTO = "stock", "auto"
ON_GPU = {
    "model_name_or_path": "unsloth/Llama-3.2-1B-Instruct", "backend": "auto", "use_cpu": "false", "dtype": "bfloat16",
    "bf16": "true", "load_in_4bit": "true", "gradient_checkpointing": "true", "max_length": "1024", "max_steps": "100",
    "per_device_train_batch_size": "8", "gradient_accumulation_steps": "1", "per_device_eval_batch_size": "4",
    "dataset_size": "512",
    "dataset_options": '{"needle_haystack": {"min_num_statements": 20, "max_num_statements": 60}}',
}  # fmt: skip
"""The recipe's keys on a GPU: a real model in 4 bits, longer prompts, and Unsloth where it is installed.

Unsloth's own defaults accumulate two micro-batches; here a step is one in every backend."""
WITHOUT_BFLOAT16 = {"dtype": "float16", "bf16": "false", "fp16": "true"}
"""Changes of `ON_GPU` for older GPUs, as the free ones of Colab."""


@dataclass(frozen=True)
class BatchSizes:
    """The sizes that decide a micro-batch's cost: tokens by role, and the padded shape."""

    dense: int
    context: int
    padding: int
    loss: int
    shape: tuple[int, int]


@dataclass
class BatchLog:
    """Keeps every training batch's labels and mask; roles are computed later, outside the timed steps."""

    seen: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def hook(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = read_batch(kwargs)
        if model.training and torch.is_grad_enabled() and batch.labels is not None:
            self.seen.append((batch.labels, batch.attention_mask))

    def batches(self) -> list[BatchSizes]:
        found = []
        for labels, mask in self.seen:
            parts = TokenPartition.from_labels(labels, mask)
            rows = (len(parts.dense), len(parts.context), len(parts.padding), len(parts.loss))
            found.append(BatchSizes(*rows, parts.shape))
        return found

    def digest(self, count: int) -> str:
        """Digests the first ``count`` batches, to compare runs."""
        return _digest([labels for labels, _ in self.seen[:count]])


def quickstart(
    output_dir: str | Path = "runs/quickstart",
    steps: int | None = None,
    test_size: int | None = None,
    model: str | None = None,
) -> dict:
    """Trains and evaluates the runs; prints the table and saves table, picture and figures in ``output_dir``.

    Two runs take turns, step by step, so that the times of their steps are compared in pairs: dense and sparse, and on
    a GPU stock Unsloth (PEFT, where Unsloth is not installed) and `auto`. A third run on the CPU is dense and stops at
    the sparse run's FLOPs.

    Args:
        output_dir: results of an earlier quickstart in it are replaced.
        steps: optimiser steps of the dense and the sparse run, instead of the recipe's.
        test_size: held-out samples, instead of the recipe's.
        model: a hub name or a folder, instead of the recipe's model; with a chat template.

    Returns:
        The figures, as saved in ``results.json``.

    Raises:
        SparsityError: the model or a package is missing, or TRL cannot train on this machine.
    """
    on_gpu = has_gpu()
    check_can_train(use_cpu=not on_gpu)
    began = time.perf_counter()
    folder, console = Path(output_dir), Console()
    check_output(folder, "output-dir")
    for name in (STOCK, AUTO) if on_gpu else (DENSE, SPARSE, EQUAL):
        _refuse_unknown_files(_run_folder(folder, name))
    asked = {"model_name_or_path": model, "max_steps": steps, "dataset_test_size": test_size}
    keys = (keys_on_gpu() if on_gpu else {}) | {key: str(value) for key, value in asked.items() if value is not None}
    overrides = [word for key, value in keys.items() for word in (f"--{key}", value)]
    overrides += ["--do_eval", "true", "--logging_steps", "1", "--disable_tqdm", "true"]
    results: dict[str, Any] = {"environment": environment(), "runs": {}}
    with _quiet(), _progress(console) as progress, SetUp(folder) as setup:

        def prepare(name: str, *words: str) -> Training:
            chosen = [*overrides, "--output_dir", str(_run_folder(folder, name)), *words]
            return Training(load_recipe(RECIPE, chosen), name, progress, setup)

        if on_gpu:
            pair = prepare(STOCK, "--sparsity", "dense"), prepare(AUTO, "--sparsity", "auto")
            detach(pair[0].trainer.model)
        else:
            pair = prepare(DENSE, "--sparsity", "dense"), prepare(SPARSE)
        results |= _describe(pair[0])
        results["before"] = evaluate(pair[0].trainer, progress)
        Turns().run(*(training.train for training in pair))
        results["pairs"] = _pairs(*pair).as_dict()
        results["sparsity"] = get_state(pair[1].trainer.model).config.model_dump(mode="json")
        logs = {training.name: training.batches for training in pair}
        runs = {training.name: training.figures(count_flops=not on_gpu) for training in pair}
        if not on_gpu:
            equal_steps = equal_cost_steps(runs[DENSE]["flops_by_step"], runs[SPARSE]["flops"])
            equal = prepare(EQUAL, "--sparsity", "dense", "--max_steps", str(equal_steps))
            equal.train()
            runs[EQUAL], logs[EQUAL] = equal.figures(), equal.batches
        results["runs"] = runs
    results |= _compare(runs, logs)
    results["seconds"] = time.perf_counter() - began
    save_report(results, folder)
    console.print(terminal_table(results))
    console.print(f"Table, figures and picture: {folder}/results.md, results.json, quickstart.png", highlight=False)
    return results


def has_gpu() -> bool:
    """Whether the quickstart takes the real path: a model in 4 bits, by `auto`, against stock Unsloth."""
    return torch.cuda.is_available()


def keys_on_gpu() -> dict[str, str]:
    """Returns the recipe's keys for this machine's GPU."""
    has_bfloat16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return ON_GPU if has_bfloat16 else ON_GPU | WITHOUT_BFLOAT16


def equal_cost_steps(dense_flops: list[int], budget: int) -> int:
    """Returns the number of first dense steps whose FLOPs come nearest to ``budget``; at least one."""
    spent, steps = 0, 0
    for step, flops in enumerate(dense_flops, start=1):
        if abs(spent + flops - budget) > abs(spent - budget):
            break
        spent, steps = spent + flops, step
    return max(steps, 1)


def _run_folder(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "-").replace(" ", "-")


def _refuse_unknown_files(folder: Path) -> None:
    """Raises DataError where a run's folder, which would be emptied, holds files of no quickstart."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    unknown = [name for name in names if not any(fnmatch.fnmatch(name, own) for own in OWN_FILES)]
    if unknown:
        raise DataError(
            f"output-dir: {folder} would be emptied, and holds {', '.join(sorted(unknown)[:5])}, which is of no "
            "quickstart. Give another --output-dir."
        )


class Training:
    """One of the runs: its trainer, the times of its steps and its batches.

    Loading a recipe resets state that trainers share; the trainer that is built next sets it again, for all.
    """

    def __init__(self, recipe: Recipe, name: str, progress: Progress, setup: SetUp):
        self.recipe, self.name, self.batches, self._progress = recipe, name, BatchLog(), progress
        task = progress.add_task(name, total=recipe.training.max_steps)
        progress.refresh()  # it is loaded now
        self.trainer, self.timer = build_trainer(recipe, (_Advance(progress, task),))
        self.trainer.remove_callback(PrinterCallback)
        self._initial = _digest([parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad])

        def replace_earlier_run() -> None:
            setup.over = True
            shutil.rmtree(recipe.training.output_dir, ignore_errors=True)

        self.timer.begins = replace_earlier_run

    def train(self, give_away: Callable[[], None] | None = None) -> None:
        """Trains and saves the adapter; ``give_away`` is called before each step but the first, if given."""
        trainer, folder = self.trainer, Path(self.recipe.training.output_dir)
        if give_away is not None:
            trainer.callback_handler.callbacks.insert(0, StepInTurns(give_away))
        handle = trainer.model.register_forward_pre_hook(self.batches.hook, prepend=True, with_kwargs=True)
        self.timer.start()
        trainer.train()
        handle.remove()
        trainer.save_model(str(folder / "adapter"))
        self.recipe.save(folder / "recipe.yaml")

    def figures(self, count_flops: bool = True) -> dict[str, Any]:
        """Evaluates the trained model and returns the run's figures as plain data."""
        trainer, times, log = self.trainer, self.timer.times, self.batches.batches()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        tokens = sum(batch.dense + batch.context for batch in log)
        return {
            "steps": len(times.seconds),
            "losses": losses,
            "train_loss": sum(losses[-_last_tenth(losses) :]) / _last_tenth(losses),
            "evaluation": evaluate(trainer, self._progress),
            "setup_seconds": self.timer.setup_seconds,
            "step_seconds": times.seconds,
            "step_is_sparse": times.sparse,
            "median_step_seconds": statistics.median(times.seconds[1:] or times.seconds),
            "context_share": sum(batch.context for batch in log) / tokens,
            "padding_share": sum(batch.padding for batch in log) / sum(math.prod(batch.shape) for batch in log),
            "initial_adapter": self._initial,
            **(self._flops(log) if count_flops else {}),
        }

    def _flops(self, log: list[BatchSizes]) -> dict[str, Any]:
        flops, calibration = (
            flops_by_step(self.recipe, self.trainer, log),
            _calibration_flops(self.recipe, self.trainer),
        )
        real = flops_by_step(self.recipe, self.trainer, [replace(batch, padding=0) for batch in log])
        return {
            "flops_by_step": flops,
            "flops_by_step_without_padding": real,
            "calibration_flops": calibration,
            "flops": sum(flops) + calibration,
        }


def _pairs(first: Training, second: Training) -> Pairs:
    """Pairs the second run's sparse steps (all, where none is) with the first run's steps on the same batches.

    The first step of both, which warms up, comes first.
    """
    sparse = second.timer.times.sparse
    steps = [step for step, is_sparse in enumerate(sparse) if is_sparse or step == 0 or not any(sparse)]
    return Pairs.of(*([run.timer.times.seconds[step] for step in steps] for run in (first, second)))


def flops_by_step(recipe: Recipe, trainer: SFTTrainer, batches: list[BatchSizes]) -> list[int]:
    """Counts the FLOPs of each optimiser step as it is computed.

    Dense steps compute padding too; channel-sparse MLPs, and a backward pass through chosen rows, leave it out."""
    config, steps = trainer.model.config, len(batches)
    shape = ModelShape.from_config(config)
    layers = recipe.sparsity.layer_sparsity(shape.num_layers)
    state = get_state(trainer.model)
    estimator = getattr(state, "estimator", None)
    counts = []
    for step, batch in enumerate(batches):
        scale = recipe.sparsity.schedule.scale(step, steps) if recipe.sparsity.is_sparse(shape.num_layers) else 0.0
        scaled = [(mlp * scale, attention * scale) for mlp, attention in layers]
        rows = recipe.sparsity.backward_rows if scale and batch.context else 1.0
        counts.append(_step_flops(recipe, shape, scaled, batch, _scoring_rank(estimator) if scale else 0, rows))
    return counts


def _step_flops(
    recipe: Recipe, shape: ModelShape, layers: list, batch: BatchSizes, estimator_rank: int, backward_rows: float
) -> int:
    size, length = batch.shape
    head_tokens = min(math.ceil(max(batch.loss, 1) / HEAD_CHUNK) * HEAD_CHUNK, size * (length - 1))
    options = {"lora_rank": recipe.model.lora_r, "checkpointing": recipe.training.gradient_checkpointing}
    sparse, row_sparse = any(map(any, layers)), backward_rows < 1
    apart = sparse or row_sparse
    step = step_flops(
        shape,
        layers,
        TrainingStep(
            dense_tokens=batch.dense + (0 if apart else batch.padding + batch.context),
            context_tokens=batch.context if apart else 0,
            padding_tokens=batch.padding if row_sparse else 0,
            backward_rows=backward_rows,
            whole_layers=False,
            seq_lengths=[length] * size,
            head_tokens=head_tokens,
            estimator_rank=estimator_rank,
            **options,
        ),
    )
    total = step.total + step.forward.head
    if sparse:
        dense_mlps = sum(mlp == 0 for mlp, _ in layers)
        for count, targets in ((dense_mlps, ATTENTION + MLP), (shape.num_layers - dense_mlps, ATTENTION)):
            part = replace(shape, num_layers=count)
            padding = step_flops(
                part,
                [(0.0, 0.0)] * count,
                TrainingStep(batch.padding, 0, [], head_tokens=0, lora_targets=targets, **options),
            ).parts
            total += padding.attention_projections + padding.lora + (padding.mlp_base if MLP[0] in targets else 0)
    return total


def _scoring_rank(estimator: Any) -> int:
    return 0 if estimator is None else estimator.rank


def _calibration_flops(recipe: Recipe, trainer: SFTTrainer) -> int:
    """Counts the FLOPs of the calibration pass; building the factors counts in the measured set-up time only."""
    state = get_state(trainer.model)
    if state is None or state.estimator is None or state.estimator.kind == "svd":
        return 0
    shape = ModelShape.from_config(trainer.model.config)
    lengths = [len(ids) for ids in trainer.train_dataset[: recipe.sparsity.estimator.calibration_samples]["input_ids"]]
    groups = [lengths[start : start + CALIBRATION_BATCH] for start in range(0, len(lengths), CALIBRATION_BATCH)]
    padded = [max(group) for group in groups for _ in group]
    dense = [(0.0, 0.0)] * shape.num_layers
    forward = step_flops(shape, dense, TrainingStep(sum(padded), 0, padded, recipe.model.lora_r, head_tokens=0)).forward
    # The energies need a second computation of gate and up.
    return forward.total + forward.mlp_base * 2 // 3


@torch.no_grad()
def evaluate(trainer: SFTTrainer, progress: Progress | None = None) -> dict[str, float]:
    """Evaluates the held-out samples with teacher forcing and the dense forward.

    ``answer_loss`` is the mean negative log-likelihood, in nats, of the answers' tokens (with the end of turn).
    ``token_accuracy`` is the share of these tokens that are the most likely ones. ``exact_match`` is the share of
    answers in which every token is: the answers that greedy decoding would produce.
    """
    model = trainer.model
    was_training = model.training
    model.eval()
    loss, correct, tokens, exact, answers = 0.0, 0, 0, 0, 0
    batches = held_out_batches(trainer)
    for batch in batches if progress is None else progress.track(batches, description="evaluating"):
        labels = batch.labels[:, 1:]
        # Without labels the model returns logits, in TRL's patched forward too.
        with trainer.compute_loss_context_manager():  # mixed precision, as in training
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        answer = labels != -100
        chosen = logits[answer].float()
        loss += nn.functional.cross_entropy(chosen, labels[answer], reduction="sum").item()
        hit = (logits.argmax(-1) == labels) | ~answer
        correct += (hit & answer).sum().item()
        tokens += answer.sum().item()
        exact += hit.all(1).sum().item()
        answers += len(labels)
    model.train(was_training)
    return {
        "answer_loss": loss / tokens,
        "token_accuracy": correct / tokens,
        "exact_match": exact / answers,
        "answers": answers,
    }


def held_out_batches(trainer: SFTTrainer) -> list[Batch]:
    """Returns the held-out samples, one a row, the longest first, padded on the right.

    The trainer's own batches may be one row of several documents: Unsloth's are, unless a recipe says otherwise.
    """
    samples = [read_batch(trainer.data_collator([row])) for row in trainer.eval_dataset]
    samples.sort(key=lambda sample: -sample.input_ids.shape[1])
    size, device = trainer.args.per_device_eval_batch_size, trainer.model.device

    def padded(rows: list[Tensor], filler: int) -> Tensor:
        return pad_sequence([row.flatten() for row in rows], batch_first=True, padding_value=filler).to(device)

    return [
        Batch(
            labels=padded([sample.labels for sample in group], -100),
            input_ids=padded([sample.input_ids for sample in group], trainer.processing_class.pad_token_id),
            attention_mask=padded([torch.ones_like(sample.input_ids) for sample in group], 0),
        )
        for group in (samples[start : start + size] for start in range(0, len(samples), size))
    ]


def _describe(training: Training) -> dict[str, Any]:
    recipe = training.recipe
    used_unsloth = training.trainer.model.__dict__["_sparse_backend"] == "unsloth"
    return {
        "model": recipe.model.model_name_or_path,
        "backend": "Unsloth" if used_unsloth else "PEFT",
        "dataset": recipe.data.dataset_name,
        "batch_size": recipe.training.per_device_train_batch_size,
        "trainable_parameters": sum(p.numel() for p in training.trainer.model.parameters() if p.requires_grad),
    }


def _compare(runs: dict[str, dict], logs: dict[str, BatchLog]) -> dict[str, Any]:
    """Compares runs: whether start and data are the same, and a batch's FLOPs, dense and sparse."""
    dense, sparse, *_ = runs.values()
    steps = [step for step, is_sparse in enumerate(sparse["step_is_sparse"]) if is_sparse]

    def ratio(name: str) -> float:
        spent = [sum(run[name][step] for step in steps) for run in (dense, sparse)]
        return spent[1] / spent[0]

    found = {
        "same_initial_adapter": len({run["initial_adapter"] for run in runs.values()}) == 1,
        "same_batches": all(
            logs[name].digest(run["steps"]) == next(iter(logs.values())).digest(run["steps"])
            for name, run in runs.items()
        ),
    }
    if steps and "flops" in dense:
        found["sparse_step_flops"] = ratio("flops_by_step")
        found["sparse_step_flops_without_padding"] = ratio("flops_by_step_without_padding")
    return found


class _Advance(TrainerCallback):
    """Advances the bar between steps, in the training's thread: a thread that redraws would disturb the timing."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.update(self._task, completed=state.global_step, refresh=True)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:18}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)


@contextmanager
def _quiet():
    """Hides the libraries' progress bars, which would interrupt ours."""
    import datasets
    from transformers.utils import logging as transformers_logging

    level = logging.getLogger("transformers").level
    switches = [(datasets.disable_progress_bars, datasets.enable_progress_bars)]
    switches += [(transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar)]
    shown = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    switches = [switch for switch, is_on in zip(switches, shown, strict=True) if is_on]
    for off, _ in switches:
        off()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        for _, on in switches:
            on()
        logging.getLogger("transformers").setLevel(level)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()[:16]


def _last_tenth(values: list) -> int:
    return max(1, len(values) // 10)
