"""Runs a recipe through TRL's ``SFTTrainer`` and writes the run folder.

Importing this module imports TRL. With the Unsloth backend, Unsloth must come before it, as on the command line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from sparse_unsloth.backends.choose import explain_backend
from sparse_unsloth.checkpoints import check_checkpoint, damage, last_whole_checkpoint, read_state, stored_checkpoints
from sparse_unsloth.config import SparsityConfig
from sparse_unsloth.data.datasets import length_filter, load_dataset_for
from sparse_unsloth.data.ledger import HELD_OUT, TRAINING, Ledger, settle
from sparse_unsloth.data.smollm2 import resolve_base, resolve_model
from sparse_unsloth.data.templates import not_written
from sparse_unsloth.distributed import from_main, is_main, world_size
from sparse_unsloth.errors import BackendError, DataError
from sparse_unsloth.explain.records import RECORDS_FILE
from sparse_unsloth.explain.report import write as write_explanation
from sparse_unsloth.faults import SetUp, check_output
from sparse_unsloth.language_model import TARGET_MODULES, FastSparseLanguageModel
from sparse_unsloth.partition import EVERY_TOKEN_BEARS_LOSS, ROLES_COME_FROM
from sparse_unsloth.rank import apply as apply_rank
from sparse_unsloth.rank import save_pruned_checkpoint
from sparse_unsloth.recipe import SEQ_CLS, Recipe, RecipeError, raw_values, recipe_keys
from sparse_unsloth.saved_adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    SETTINGS,
    check_targets,
    find_adapter,
    is_lost,
    named_targets,
)
from sparse_unsloth.training.requirements import check_can_train
from sparse_unsloth.unreadable import first_line
from sparse_unsloth.utils.environment import environment

logger = logging.getLogger("sparse_unsloth")

try:
    import resource
except ImportError:  # Windows
    resource = None

RECIPE_FILE, METRICS_FILE, ENVIRONMENT_FILE = "recipe.yaml", "metrics.json", "environment.json"
PRUNED_FOLDER = "adapter-pruned"
ESTIMATOR_FILE = "estimator.safetensors"
UNIMPORTANT = (
    "output_dir", "run_name", "resume_from_checkpoint", "disable_tqdm", "report_to", "trackio", "project", "hub_",
    "push_to", "log_", "logging_", "save_", "eval_", "do_", "per_device_eval", "metric_for", "greater_is", "load_best",
    "dataloader_", "dataset_num_proc", "extends", "include_", "use_cpu", "debug", "skip_memory",
)  # fmt: skip
"""What keys begin with that decide nothing of what a step of the training computes."""
BNB_KEYS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass
class StepTimes:
    """Seconds of each optimiser step of a run, and whether it was sparse.

    ``starts`` are the steps at which its parts began: the first one, and each that followed an interruption.
    """

    seconds: list[float] = field(default_factory=list)
    sparse: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def warm(self) -> list[tuple[float, bool]]:
        """Without the first step of each part, which warms up."""
        pairs = zip(self.seconds, self.sparse, strict=True)
        return [pair for index, pair in enumerate(pairs) if index not in self.starts]

    def median(self, sparse: bool) -> float | None:
        """Of the sparse or of the dense steps, the warm ones; None if there were none."""
        chosen = [seconds for seconds, was in self.warm() if was is sparse]
        return statistics.median(chosen) if chosen else None


class StepTimer(TrainerCallback, ExportableState):
    """Times optimiser steps: forward, backward, update; not the loading of data, nor logging, saving and evaluation.

    It also keeps what transformers' Trainer begins anew when it is resumed, and takes it along in the checkpoints, so
    that times and losses are of the whole run: without interruptions, and without steps that were lost with them.

    Args:
        sparsity: decides which steps count as sparse.
        num_layers: of the model, for the layer rules.

    Attributes:
        begins: called once, before the first step.
        data: the digest of the training data (`data_digest`), to be stored.
    """

    def __init__(self, sparsity: SparsityConfig, num_layers: int):
        self.times = StepTimes()
        self.setup_seconds = 0.0
        self.begins: Callable[[], None] = lambda: None
        self.data: str | None = None
        self._schedule = sparsity.schedule
        self._any_sparse = sparsity.is_sparse(num_layers)
        self._created = self._begun = time.perf_counter()
        self._first = True
        self._trainer: Trainer | None = None
        self._before: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Of the whole training up to now."""
        return self._before.get("train_seconds", 0.0) + time.perf_counter() - self._created

    def start(self, trainer: Trainer | None = None, before: dict[str, Any] | None = None) -> None:
        """Called just before ``trainer.train()``: what passes until the first step is set-up, calibration included.

        Args:
            trainer: the one that will train, for its losses.
            before: what `state` stored in the checkpoint that it will resume from.
        """
        self._created, self._first, self._trainer, self._before = time.perf_counter(), True, trainer, before or {}
        if before:
            self.times = StepTimes(**before["times"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, as plain data."""
        stored = {
            "times": asdict(self.times),
            "train_seconds": self.seconds,
            "setup_seconds": self.setup_seconds,
            "memory": self.memory(),
            "data": self.data,
            "processes": world_size(),
        }
        if self._trainer is not None and hasattr(self._trainer, "_tr_loss"):
            # Of several processes the first one's share of what was not logged yet stands for all of them.
            stored["loss"] = [
                self._trainer._total_loss_scalar,
                self._trainer._tr_loss.item(),
                self._trainer._globalstep_last_logged,
            ]
            stored["tokens"] = getattr(self._trainer, "_total_train_tokens", None)
        return {"args": {}, "attributes": stored}

    def memory(self) -> dict[str, int]:
        """`peak_memory` of all parts."""
        found, earlier = peak_memory(), self._before.get("memory", {})
        return {name: max(found.get(name, 0), earlier.get(name, 0)) for name in {**earlier, **found}}

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self._trainer
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # a checkpoint of an older version has none
        if trainer is None:
            return
        if "loss" in self._before:
            trainer._total_loss_scalar, waiting, trainer._globalstep_last_logged = self._before["loss"]
            trainer._tr_loss += waiting
        if self._before.get("tokens") is not None:
            trainer._total_train_tokens = self._before["tokens"]
        if state.global_step >= state.max_steps:
            # Interrupted after the last step: the trainer would take another one.
            trainer._run_epoch = lambda *args, **kwargs: None

    def on_step_begin(self, args, state, control, **kwargs):
        if self._first:
            self.begins()
        self._begun = _now()
        if self._first:
            self.setup_seconds, self._first = (
                self._before.get("setup_seconds", 0.0) + self._begun - self._created,
                False,
            )
            self.times.starts.append(len(self.times.seconds))

    def on_step_end(self, args, state, control, **kwargs):
        self.times.seconds.append(_now() - self._begun)
        # global_step counts this step already.
        scale = self._schedule.scale(state.global_step - 1, state.max_steps)
        self.times.sparse.append(self._any_sparse and scale > 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        earlier = self._before.get("train_seconds")
        if earlier is None or "train_runtime" not in (logs or {}):
            return
        # The trainer's last line: it counts the samples and steps of the whole run, and the seconds of the last part.
        whole = logs["train_runtime"] + earlier
        changes = {
            name: logs[name] * logs["train_runtime"] / whole
            for name in ("train_samples_per_second", "train_steps_per_second")
            if name in logs
        } | {"train_runtime": whole}
        logs.update(changes)
        if state.log_history and "train_runtime" in state.log_history[-1]:
            state.log_history[-1].update(changes)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind in memory; `metrics` is also written to the run folder.

    ``trained`` is False where the run was finished before: nothing was done then.
    """

    folder: Path
    metrics: dict[str, Any]
    trained: bool = True


def run(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = ()) -> RunResult:
    """Trains what ``recipe`` describes and writes recipe, adapter, metrics and environment into its ``output_dir``.

    Nothing is written before the first step. A run that is resumed and was finished before stays as it is. Losses and
    times in the metrics are those of the whole run, whatever interrupted it.
    Where channels were looked at (``explain_steps``), what `sparse-unsloth explain` says is written there too.

    Raises:
        SparsityError: this machine cannot train it, the folder holds another run, or model or data are out of reach.
    """
    if recipe.model.lora_task_type != SEQ_CLS:
        check_can_train(recipe.training.use_cpu)
    folder = Path(recipe.training.output_dir)
    checkpoint, finished = from_main(lambda: begin(recipe))
    if finished:
        return _nothing_to_do(folder, finished)
    with SetUp(folder) as setup:
        trainer, timer = build_trainer(recipe, callbacks, checkpoint)
        timer.data, before, planned = data_digest(trainer.train_dataset), None, None
        if checkpoint is not None:
            planned, done = _planned_steps(trainer), _finished_metrics(folder)
            if done is not None and done["steps"] >= planned and _is_complete(recipe, done):
                return _nothing_to_do(folder, done)
            before = _resume_state(checkpoint, timer.data, planned)

        def begin_to_write() -> None:
            setup.over = True
            if trainer.is_world_process_zero():
                _begin_folder(recipe, folder, planned)

        timer.begins = begin_to_write
        timer.start(trainer, before)
        _forget_peak_memory()
        if checkpoint is not None and read_state(checkpoint)["global_step"] >= planned:
            begin_to_write()
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        seconds, memory = timer.seconds, timer.memory()
        trainer.save_model(str(folder / ADAPTER_FOLDER))
        metrics = {
            "steps": outcome.global_step,
            "train_loss": outcome.training_loss,
            "train_seconds": seconds,
            "setup_seconds": timer.setup_seconds,
            "median_step_seconds": {kind: timer.times.median(kind == "sparse") for kind in ("dense", "sparse")},
            "step_times": asdict(timer.times),
            "memory": memory,
            **throughput(trainer, timer.times),
            "data": trainer.ledger.as_dict(),
            "log": trainer.state.log_history,
        }
        if trainer.is_world_process_zero():
            if recipe.rank is not None and recipe.rank.retain_ratio is not None:
                save_pruned_checkpoint(trainer.model, folder / PRUNED_FOLDER, recipe.rank.retain_ratio)
            _write_json(folder / METRICS_FILE, metrics)
            if (folder / RECORDS_FILE).is_file():
                write_explanation(folder)
        if trainer.eval_dataset is not None:
            # Afterwards: should it fail, the training and its figures are safe.
            metrics["evaluation"] = trainer.evaluate()
            if trainer.is_world_process_zero():
                _write_json(folder / METRICS_FILE, metrics)
    return RunResult(folder, metrics)


def _begin_folder(recipe: Recipe, folder: Path, planned: int | None) -> None:
    """Writes what a run's folder has from its first step on; figures of a shorter run, now trained longer, are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished_metrics(folder)
    if None not in (done, planned) and done["steps"] < planned:
        (folder / METRICS_FILE).replace(folder / f"metrics-{done['steps']}-steps.json")
    recipe.save(folder / RECIPE_FILE)
    _write_json(folder / ENVIRONMENT_FILE, environment())


def _nothing_to_do(folder: Path, metrics: dict[str, Any]) -> RunResult:
    if is_main():
        print(
            f"sparse-unsloth: nothing to do: the run in {folder} is finished ({metrics['steps']} steps), and stays as "
            "it is. To train it longer raise max_steps or num_train_epochs; to train again give another --output_dir."
        )
    return RunResult(folder, metrics, trained=False)


def build_trainer(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = (), checkpoint: str | None = None
) -> tuple[Trainer, StepTimer]:
    """The trainer of ``recipe`` with its model attached, data loaded and steps timed.

    Args:
        recipe: what to train; TRL's ``SFTTrainer`` trains text, transformers' ``Trainer`` a classifier (SEQ_CLS).
        callbacks: beside the timer.
        checkpoint: the one that will be resumed from; the estimator that lies beside it is used again.

    Raises:
        SparsityError: see `run`.
    """
    build = _build_classifier if recipe.model.lora_task_type == SEQ_CLS else _build_sft
    return build(recipe, callbacks, checkpoint)


def _build_sft(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...], checkpoint: str | None
) -> tuple[SFTTrainer, StepTimer]:
    training, arguments = recipe.training, recipe.model
    if training.label_smoothing_factor and getattr(training, "loss_type", "nll") != "nll":
        raise RecipeError(
            f"label_smoothing_factor: TRL's loss {training.loss_type!r} fails with it. Give loss_type: nll, or leave "
            "it out."
        )
    ledger, max_length = Ledger(), training.max_length
    fits = length_filter(recipe.data, arguments.model_name_or_path, max_length, training, **_hub(recipe))
    train_data, test_data = load_dataset_for(
        recipe.data, _evaluates(recipe), training.completion_only_loss, fits, training.dataset_text_field, ledger
    )
    _check_context_exists(recipe, train_data.column_names)
    backend = "peft" if training.use_cpu and recipe.backend == "auto" else recipe.backend
    model, tokenizer = _load(recipe, explain_backend(backend)[0], checkpoint)
    model, timer = _adapt(recipe, model, checkpoint)
    try:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=training,
            train_dataset=train_data,
            eval_dataset=test_data,
            callbacks=[timer, *callbacks],
        )
    except TemplateError as error:
        raise DataError(f"{recipe.data.dataset_name}: the chat template refuses a conversation: {error}") from error
    _check_plan(recipe, trainer, ledger)
    ledger.others += not_written(train_data, tokenizer, getattr(trainer, "chat_template", None))
    settle(trainer, ledger, max_length)
    trainer.ledger = ledger
    return trainer, timer


def _build_classifier(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...], checkpoint: str | None
) -> tuple[Trainer, StepTimer]:
    from sparse_unsloth.data import classification

    training, name = recipe.training, recipe.model.model_name_or_path
    if recipe.backend == "unsloth":
        raise BackendError(
            "backend: 'unsloth' has no fast path for classification heads (SEQ_CLS). Use backend: peft, or auto."
        )
    ledger = Ledger()
    train_data, test_data, columns = classification.load_labelled(recipe.data, _evaluates(recipe), ledger)
    names = classification.label_names(train_data, test_data)
    tokenizer = classification.load_tokenizer(name, **_hub(recipe))
    encoded = [
        None if data is None else classification.encode(data, columns, names, tokenizer, training.max_length)
        for data in (train_data, test_data)
    ]
    config = classification.model_config(resolve_base(name), names, tokenizer.pad_token_id, **_hub(recipe))
    model, _ = _load(recipe, "peft", checkpoint, auto_model=AutoModelForSequenceClassification, config=config)
    model, timer = _adapt(recipe, model, checkpoint)
    metrics = classification.metrics_for(classification.task_of(recipe.data), names)
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=training,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=encoded[0],
        eval_dataset=encoded[1],
        compute_metrics=classification.compute_metrics(metrics, names),
        callbacks=[timer, *callbacks],
    )
    _check_plan(recipe, trainer, ledger)
    ledger.log()
    trainer.ledger = ledger
    return trainer, timer


def _check_plan(recipe: Recipe, trainer: Trainer, ledger: Ledger) -> None:
    """Refuses a training without a step; warns of samples that nothing uses, and of a learning rate never reached.

    Raises:
        DataError: there is no full batch, and only full ones are trained.
    """
    training, data = trainer.args, trainer.train_dataset
    held_out = ledger.split(TRAINING).set_aside.get(HELD_OUT)
    if held_out and not _evaluates(recipe):
        ledger.others.append(
            f"{held_out:,} samples are held out (dataset_test_size), and this run does not evaluate them. do_eval: "
            "true does; without dataset_test_size they are trained"
        )
    if not hasattr(data, "__len__"):
        return
    batch = training.train_batch_size * world_size()
    if training.dataloader_drop_last and len(data) < batch:
        raise DataError(
            f"{recipe.data.dataset_name}: its {len(data)} training samples are less than a batch "
            f"({training.train_batch_size} on each of {world_size()} processes), and dataloader_drop_last leaves out "
            "what does not fill one: nothing would be trained. Lower per_device_train_batch_size, or leave "
            "dataloader_drop_last out."
        )
    planned = _planned_steps(trainer)
    warmup = training.get_warmup_steps(planned)
    if warmup >= planned and training.lr_scheduler_type != "constant" and is_main():
        logger.warning(
            "warmup_steps: the learning rate warms up for %d steps, and the training has %d: it ends at %.2g and never "
            "reaches learning_rate (%.2g).",
            warmup,
            planned,
            training.learning_rate * (planned - 1) / max(warmup, 1),
            training.learning_rate,
        )


def _evaluates(recipe: Recipe) -> bool:
    return recipe.training.eval_strategy != "no" or recipe.training.do_eval


def _load(recipe: Recipe, backend: str, checkpoint: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The recipe's model and tokenizer; an adapter, with its base, comes with the recipe's sparsity.

    Raises:
        DataError: they cannot be had.
    """
    training, arguments = recipe.training, recipe.model
    options = {**(training.model_init_kwargs or {}), **options}
    # TRL would apply them to a model name; here the model comes loaded.
    training.model_init_kwargs = None
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if training.max_length is not None:
        options["max_seq_length"] = training.max_length
    if training.use_cpu:
        options["device_map"] = "cpu"
    if arguments.load_in_4bit and any(key in recipe.given for key in BNB_KEYS):
        options["quantization_config"] = _quantization(arguments)
    name = resolve_model(arguments.model_name_or_path)
    if find_adapter(name) is not None:
        options["sparsity"] = _with_estimator_path(recipe, checkpoint)
        if is_main():
            settings = f"rank {arguments.lora_r}, over {resolve_base(name)}"
            print(f"sparse-unsloth: training goes on from the adapter in {name} ({settings})")
    elif is_lost(name):
        raise _not_loaded(recipe, f"there is no such folder (looked for from {Path.cwd()})")
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file() and "gguf_file" not in options:
        raise _not_loaded(recipe, "there is no config.json in it")
    try:
        return FastSparseLanguageModel.from_pretrained(
            name,
            dtype=None if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype),
            load_in_4bit=arguments.load_in_4bit,
            backend=backend,
            use_gradient_checkpointing=_checkpointing(recipe),
            random_state=training.seed,
            **_hub(recipe),
            **options,
        )
    except OSError as error:
        raise _not_loaded(recipe, first_line(error).rstrip(".")) from error


def _not_loaded(recipe: Recipe, reason: str) -> DataError:
    return DataError(
        f"model_name_or_path: {recipe.model.model_name_or_path!r} cannot be loaded: {reason}. It must be a folder "
        "with a transformers checkpoint or a LoRA adapter, or a hub name that can be reached from here."
    )


def _adapt(recipe: Recipe, model: nn.Module, checkpoint: str | None) -> tuple[nn.Module, StepTimer]:
    """The model with its adapters and sparse paths, and what times its steps; an adapter that it came with is kept."""
    arguments = recipe.model
    if not hasattr(model, "peft_config"):
        targets = named_targets(arguments.lora_target_modules) or TARGET_MODULES
        check_targets(model, targets)
        check_targets(model, arguments.lora_modules_to_save, "lora_modules_to_save")
        model = FastSparseLanguageModel.get_peft_model(
            model,
            r=arguments.lora_r,
            target_modules=targets,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            use_rslora=arguments.use_rslora,
            modules_to_save=arguments.lora_modules_to_save,
            use_gradient_checkpointing=_checkpointing(recipe),
            random_state=recipe.training.seed,
            sparsity=_with_estimator_path(recipe, checkpoint),
            **({"use_dora": True} if arguments.use_dora else {}),
        )
    if recipe.rank is not None:
        apply_rank(model, **vars(recipe.rank))
    return model, StepTimer(recipe.sparsity, model.config.get_text_config().num_hidden_layers)


def _checkpointing(recipe: Recipe) -> str | bool:
    return "unsloth" if recipe.training.gradient_checkpointing else False


def _hub(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.model.model_revision, "trust_remote_code": recipe.training.trust_remote_code}


def begin(recipe: Recipe) -> tuple[str | None, dict[str, Any] | None]:
    """Looks at the run's folder: ``(checkpoint to resume from, metrics of a run that is finished)``, each or None.

    Settings that the resumed run had otherwise are named. Called on one process.

    Raises:
        SparsityError: the folder holds another run, cannot be written to, has nothing to resume from, or the checkpoint
            does not fit.
    """
    asked, folder = recipe.training.resume_from_checkpoint, Path(recipe.training.output_dir)
    check_output(folder, "output_dir")
    finished = _finished_metrics(folder)
    stored = stored_checkpoints(folder)
    resumes = asked not in (None, False, "false", "False")
    in_folder = asked in (True, "true", "True")
    if resumes and not in_folder:
        checkpoint = Path(asked)
        if not checkpoint.is_dir():
            raise RecipeError(f"resume_from_checkpoint: there is no folder {asked}.")
        if stored_checkpoints(checkpoint):  # a run's folder: its last one
            last = last_whole_checkpoint(checkpoint)
            if last is None:
                raise RecipeError(f"resume_from_checkpoint: no checkpoint in {asked} is whole.")
            checkpoint = Path(last)
        in_folder = checkpoint.resolve().parent == folder.resolve()
    if not resumes or not in_folder:
        whole = any(damage(path) is None for path in stored)
        if whole or finished is not None or (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
            raise RecipeError(
                f"output_dir: {folder} holds a run already. Give another --output_dir, delete the folder, or go on "
                "with it: --resume_from_checkpoint true."
            )
    if not resumes:
        # Left by a run that ended before its first checkpoint, perhaps on other data.
        (folder / ESTIMATOR_FILE).unlink(missing_ok=True)
        return None, None
    began = (folder if in_folder else checkpoint.parent) / RECIPE_FILE
    changes = changed_settings(began, recipe) if began.is_file() else {}
    if in_folder and finished is not None:
        steps = recipe.training.max_steps
        # How many steps epochs make, only the data tell: `run` looks again.
        longer = (changes or not began.is_file()) and (finished["steps"] < steps or steps < 0)
        if not longer and _is_complete(recipe, finished):
            return None, finished
    if asked in (True, "true", "True"):
        checkpoint = last_whole_checkpoint(folder)
        if checkpoint is None and stored:
            raise RecipeError(
                f"resume_from_checkpoint: no checkpoint in {folder} is whole: {stored[0].name}: {damage(stored[0])}. "
                "Leave --resume_from_checkpoint out to begin the run again."
            )
        if checkpoint is None and (finished is not None or not began.is_file()):
            raise RecipeError(f"resume_from_checkpoint: there is no checkpoint in {folder}.")
        if checkpoint is None:
            logger.warning("%s: the run was interrupted before its first checkpoint, and begins again.", folder)
            return None, None
    else:
        check_checkpoint(checkpoint)
    _name_changes(changes, checkpoint)
    return str(checkpoint), None


def changed_settings(file: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """What ``recipe`` sets otherwise than the run's ``recipe.yaml``: ``{key: (was, is)}``, blocks by their parts.

    Keys that change nothing of what is trained (`UNIMPORTANT`) are left out.
    """
    keys = recipe_keys()
    old, new = raw_values(file), recipe.resolved()
    changes = {}
    for key in sorted({*old, *new}):
        if key.startswith(UNIMPORTANT) or key not in keys:
            continue
        was, now = (values.get(key, keys[key].default) for values in (old, new))
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            parts = {name for name in {*was, *now} if was.get(name) != now.get(name)}
            changes |= {f"{key}.{name}": (was.get(name), now.get(name)) for name in sorted(parts)}
        elif was != now and str(was) != str(now):
            changes[key] = was, now
    return changes


def _name_changes(changes: dict[str, tuple[Any, Any]], checkpoint: str | Path) -> None:
    """Warns of settings that the run began without.

    Raises:
        RecipeError: the checkpoint's adapter does not fit them.
    """
    said = {key: f"{key}: {was!r} before, {now!r} now" for key, (was, now) in changes.items()}
    misfits = [text for key, text in said.items() if key in SETTINGS or key in ("rank", "peft")]
    if misfits:
        raise RecipeError(
            f"resume_from_checkpoint: the adapter in {checkpoint} was made with other settings ({'; '.join(misfits)}). "
            "Give them as they were, or begin another run with another --output_dir."
        )
    if said:
        logger.warning(
            "The run goes on from %s with other settings than it began with: %s. Give them as they were if that is not "
            "meant.",
            checkpoint,
            "; ".join(said.values()),
        )


def _resume_state(checkpoint: str, data: str | None, planned: int) -> dict[str, Any] | None:
    """What `StepTimer.state` stored in the checkpoint; other data or another number of processes is named."""
    state = read_state(checkpoint)
    stored = state.get("stateful_callbacks", {}).get(StepTimer.__name__, {}).get("attributes")
    if stored is None:
        logger.warning(
            "%s was written by an older version, without times: those in %s will be of the steps from %d on.",
            checkpoint,
            METRICS_FILE,
            state["global_step"] + 1,
        )
        return None
    if data is not None and stored["data"] is not None and data != stored["data"]:
        logger.warning(
            "The training data are not those that %s was trained on: the run goes on with the samples at the same "
            "places of the new data.",
            checkpoint,
        )
    if stored["processes"] != world_size():
        logger.warning(
            "%s was trained by %d processes, and %d go on: a step has another number of samples.",
            checkpoint,
            stored["processes"],
            world_size(),
        )
    if state["max_steps"] != planned:
        logger.warning(
            "The run was to have %d steps and has %d now: the learning rate and the sparsity of a step are those of a "
            "run of %d steps from here on.",
            state["max_steps"],
            planned,
            planned,
        )
    return stored


def _planned_steps(trainer: Trainer) -> int:
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _finished_metrics(folder: Path) -> dict[str, Any] | None:
    """What a run wrote when it had ended; None where none has.

    Raises:
        RecipeError: the file is damaged.
    """
    if not (folder / METRICS_FILE).is_file():
        return None
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        metrics["steps"] + 0
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"output_dir: {folder / METRICS_FILE} is damaged ({error}). Delete it to go on from the last checkpoint."
        ) from error
    return metrics


def _is_complete(recipe: Recipe, metrics: dict[str, Any]) -> bool:
    """Whether a run that wrote ``metrics`` has its adapter, and the evaluation that came after it if it was to."""
    folder = Path(recipe.training.output_dir)
    evaluated = "evaluation" in metrics or not _evaluates(recipe) or not stored_checkpoints(folder)
    return evaluated and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()


def data_digest(data: Any) -> str | None:
    """Of the samples' token ids and their order; None where they cannot be read that way (streams, say)."""
    if "input_ids" not in (getattr(data, "column_names", None) or ()) or not isinstance(data, Dataset):
        return None
    # Apart, so that it does not matter into which pieces Arrow has cut the column.
    lengths, values = hashlib.sha256(), hashlib.sha256()
    for table in data.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        for chunk in table["input_ids"].chunks:
            lengths.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            values.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return f"{lengths.hexdigest()[:8]}{values.hexdigest()[:16]}"


def _check_context_exists(recipe: Recipe, columns: list[str]) -> None:
    """Only tokens without loss are sparse: a loss on every token would train densely without a word.

    Raises:
        DataError: what shall bear no loss cannot be told from the rest.
    """
    training, sparsity = recipe.training, recipe.sparsity
    asked = sparsity.by_rows or sparsity.mlp or sparsity.self_attn or sparsity.preset not in (None, "dense")
    masked = training.assistant_only_loss or ("completion" in columns and training.completion_only_loss is not False)
    masked = masked or bool({"labels", "completion_mask", "assistant_masks"} & set(columns))
    if training.completion_only_loss and not masked:
        raise DataError(
            f"completion_only_loss: the samples of {recipe.data.dataset_name} have no completion "
            f"({', '.join(columns)}), so every token would bear loss. Give prompt and completion, or "
            "assistant_only_loss: true for conversations; or leave it out."
        )
    if asked and sparsity.dense_tokens == "output" and not masked:
        raise DataError(
            f"{recipe.data.dataset_name}: with the columns {', '.join(columns)} {EVERY_TOKEN_BEARS_LOSS} Use "
            f"{ROLES_COME_FROM}, or sparsity: dense."
        )


def _with_estimator_path(recipe: Recipe, checkpoint: str | None) -> SparsityConfig:
    """Estimator factors are kept in the run folder, so that a resumed run uses those that it began with."""
    estimator = recipe.sparsity.estimator
    if estimator.path is not None:
        return recipe.sparsity
    path = str((Path(checkpoint).parent if checkpoint else Path(recipe.training.output_dir)) / ESTIMATOR_FILE)
    return recipe.sparsity.model_copy(update={"estimator": estimator.model_copy(update={"path": path})})


def _quantization(arguments):
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
        bnb_4bit_quant_storage=arguments.bnb_4bit_quant_storage or torch.uint8,
    )


def throughput(trainer: Trainer, times: StepTimes) -> dict[str, float | None]:
    """Tokens without padding, by the mean length of the data set's samples, and how many a second.

    Args:
        trainer: after its training.
        times: of the optimiser steps; those that warm up do not count for the speed.

    Returns:
        ``{"tokens": ..., "tokens_per_second": ...}``, the latter over forward, backward and update only; None where the
        samples have no ``input_ids`` to count, or there was one step only.
    """
    data, state = trainer.train_dataset, trainer.state
    if not times.seconds or "input_ids" not in (getattr(data, "column_names", None) or ()):
        return {"tokens": None, "tokens_per_second": None}
    lengths = sum(map(len, data["input_ids"]))
    by_step = lengths * state.epoch / max(state.global_step, 1)
    timed = [seconds for seconds, _ in times.warm()]
    return {
        "tokens": by_step * len(times.seconds),
        "tokens_per_second": by_step * len(timed) / sum(timed) if timed else None,
    }


def peak_memory() -> dict[str, int]:
    """Bytes: ``gpu_allocated`` and ``gpu_reserved`` of the fullest GPU of this process since `run` began to train, and
    ``host``, the most that the process ever had resident."""
    found = {}
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        found["gpu_allocated"] = max(torch.cuda.max_memory_allocated(device) for device in devices)
        found["gpu_reserved"] = max(torch.cuda.max_memory_reserved(device) for device in devices)
    if resource is not None:
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def _forget_peak_memory() -> None:
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _now() -> float:
    """The clock, after what runs on the accelerator has come to an end."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
