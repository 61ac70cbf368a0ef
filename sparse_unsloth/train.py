"""Runs a recipe through TRL's ``SFTTrainer`` and writes the run folder.

Importing this module imports TRL. With the Unsloth backend, Unsloth must come before it, as on the command line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainerCallback
from trl import SFTTrainer

from sparse_unsloth.checkpoints import last_whole_checkpoint
from sparse_unsloth.config import SparsityConfig
from sparse_unsloth.data import DataError, length_filter, load_dataset_for, resolve_model
from sparse_unsloth.doctor import check_can_train, environment
from sparse_unsloth.errors import BackendError
from sparse_unsloth.explain.records import RECORDS_FILE
from sparse_unsloth.explain.report import write as write_explanation
from sparse_unsloth.language_model import TARGET_MODULES, FastSparseLanguageModel, explain_backend
from sparse_unsloth.ledger import Ledger, settle
from sparse_unsloth.rank import apply as apply_rank
from sparse_unsloth.rank import save_pruned_checkpoint
from sparse_unsloth.recipe import SEQ_CLS, Recipe, RecipeError

try:
    import resource
except ImportError:  # Windows
    resource = None

RECIPE_FILE, METRICS_FILE, ENVIRONMENT_FILE = "recipe.yaml", "metrics.json", "environment.json"
ADAPTER_FOLDER, PRUNED_FOLDER = "adapter", "adapter-pruned"
ESTIMATOR_FILE = "estimator.safetensors"
BNB_KEYS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass
class StepTimes:
    """Seconds of each optimiser step, and whether it was sparse."""

    seconds: list[float] = field(default_factory=list)
    sparse: list[bool] = field(default_factory=list)

    def median(self, sparse: bool) -> float | None:
        """Of the sparse or of the dense steps, without the first step, which warms up; None if there were none."""
        chosen = [seconds for seconds, was in list(zip(self.seconds, self.sparse, strict=True))[1:] if was is sparse]
        return statistics.median(chosen) if chosen else None


class StepTimer(TrainerCallback):
    """Times optimiser steps: forward, backward, update; not the loading of data, nor logging, saving and evaluation.

    Args:
        sparsity: decides which steps count as sparse.
        num_layers: of the model, for the layer rules.
    """

    def __init__(self, sparsity: SparsityConfig, num_layers: int):
        self.times = StepTimes()
        self.setup_seconds = 0.0
        self._schedule = sparsity.schedule
        self._any_sparse = sparsity.is_sparse(num_layers)
        self._created = self._begun = time.perf_counter()
        self._first = True

    def start(self) -> None:
        """Called just before ``trainer.train()``: what passes until the first step is set-up, calibration included."""
        self._created, self._first = time.perf_counter(), True

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = _now()
        if self._first:
            self.setup_seconds, self._first = self._begun - self._created, False

    def on_step_end(self, args, state, control, **kwargs):
        self.times.seconds.append(_now() - self._begun)
        # global_step counts this step already.
        scale = self._schedule.scale(state.global_step - 1, state.max_steps)
        self.times.sparse.append(self._any_sparse and scale > 0)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind in memory; `metrics` is also written to the run folder."""

    folder: Path
    metrics: dict[str, Any]


def run(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = ()) -> RunResult:
    """Trains what ``recipe`` describes and writes recipe, adapter, metrics and environment into its ``output_dir``.

    Where channels were looked at (``explain_steps``), what `sparse-unsloth explain` says is written there too.

    Raises:
        SparsityError: this machine cannot train it, the folder holds another run, or model or data are out of reach.
    """
    if recipe.model.lora_task_type != SEQ_CLS:
        check_can_train(recipe.training.use_cpu)
    checkpoint = _checkpoint(recipe)
    trainer, timer = build_trainer(recipe, callbacks, checkpoint)
    folder = Path(recipe.training.output_dir)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(folder / RECIPE_FILE)
        _write_json(folder / ENVIRONMENT_FILE, environment())
    timer.start()
    _forget_peak_memory()
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    memory = peak_memory()
    trainer.save_model(str(folder / ADAPTER_FOLDER))
    metrics = {
        "steps": outcome.global_step,
        "train_loss": outcome.training_loss,
        "train_seconds": seconds,
        "setup_seconds": timer.setup_seconds,
        "median_step_seconds": {kind: timer.times.median(kind == "sparse") for kind in ("dense", "sparse")},
        "step_times": asdict(timer.times),
        "memory": memory,
        **throughput(trainer, timer.times.seconds),
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
    ledger, max_length = Ledger(), training.max_length
    fits = length_filter(recipe.data, arguments.model_name_or_path, max_length, training, **_hub(recipe))
    train_data, test_data = load_dataset_for(
        recipe.data, _evaluates(recipe), training.completion_only_loss, fits, training.dataset_text_field, ledger
    )
    _check_context_exists(recipe, train_data.column_names)
    backend = "peft" if training.use_cpu and recipe.backend == "auto" else recipe.backend
    model, tokenizer = _load(recipe, explain_backend(backend)[0])
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
    settle(trainer, ledger, max_length)
    trainer.ledger = ledger
    return trainer, timer


def _build_classifier(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...], checkpoint: str | None
) -> tuple[Trainer, StepTimer]:
    from sparse_unsloth import classification

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
    config = classification.model_config(resolve_model(name), names, tokenizer.pad_token_id, **_hub(recipe))
    model, _ = _load(recipe, "peft", auto_model=AutoModelForSequenceClassification, config=config)
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
    trainer.ledger = ledger
    return trainer, timer


def _evaluates(recipe: Recipe) -> bool:
    return recipe.training.eval_strategy != "no" or recipe.training.do_eval


def _load(recipe: Recipe, backend: str, **options: Any) -> tuple[nn.Module, Any]:
    """The recipe's model and tokenizer.

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
    try:
        return FastSparseLanguageModel.from_pretrained(
            resolve_model(arguments.model_name_or_path),
            dtype=None if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype),
            load_in_4bit=arguments.load_in_4bit,
            backend=backend,
            use_gradient_checkpointing=_checkpointing(recipe),
            random_state=training.seed,
            **_hub(recipe),
            **options,
        )
    except OSError as error:
        raise DataError(
            f"model_name_or_path: {arguments.model_name_or_path!r} cannot be loaded; it must be a folder with a "
            f"transformers checkpoint, or a hub name that can be reached from here.\n{error}"
        ) from error


def _adapt(recipe: Recipe, model: nn.Module, checkpoint: str | None) -> tuple[nn.Module, StepTimer]:
    """The model with its adapters and sparse paths, and what times its steps."""
    arguments = recipe.model
    model = FastSparseLanguageModel.get_peft_model(
        model,
        r=arguments.lora_r,
        target_modules=arguments.lora_target_modules or TARGET_MODULES,
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


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from; a folder that holds another run is refused, so that no run is lost."""
    asked, folder = recipe.training.resume_from_checkpoint, Path(recipe.training.output_dir)
    last = last_whole_checkpoint(folder)
    if asked in (None, False, "false", "False"):
        if last is not None or (folder / METRICS_FILE).exists():
            raise RecipeError(
                f"output_dir: {folder} holds a run already. Give another --output_dir, delete the folder, or go on "
                "with it: "
                "--resume_from_checkpoint true."
            )
        if recipe.training.process_index == 0:
            # Left by a run that ended before its first checkpoint, perhaps on other data.
            (folder / ESTIMATOR_FILE).unlink(missing_ok=True)
        return None
    if asked in (True, "true", "True"):
        if last is None:
            raise RecipeError(f"resume_from_checkpoint: there is no checkpoint in {folder}.")
        return last
    if not Path(asked).is_dir():
        raise RecipeError(f"resume_from_checkpoint: there is no folder {asked}.")
    return asked


def _check_context_exists(recipe: Recipe, columns: list[str]) -> None:
    """Only tokens without loss are sparse: a loss on every token would train densely without a word."""
    training, sparsity = recipe.training, recipe.sparsity
    asked = sparsity.by_rows or sparsity.mlp or sparsity.self_attn or sparsity.preset not in (None, "dense")
    masked = training.assistant_only_loss or ("completion" in columns and training.completion_only_loss is not False)
    masked = masked or bool({"labels", "completion_mask", "assistant_masks"} & set(columns))
    if asked and sparsity.dense_tokens == "output" and not masked:
        raise DataError(
            f"{recipe.data.dataset_name}: with the columns {', '.join(columns)} every token bears loss, so no token "
            "can be "
            "sparse. Use prompt and completion (or question and answer) columns, messages with assistant_only_loss: "
            "true, "
            "or sparsity: dense."
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


def throughput(trainer: Trainer, step_seconds: list[float]) -> dict[str, float | None]:
    """Tokens without padding, by the mean length of the data set's samples, and how many a second.

    Args:
        trainer: after its training.
        step_seconds: of the optimiser steps; the first one, which warms up, does not count for the speed.

    Returns:
        ``{"tokens": ..., "tokens_per_second": ...}``, the latter over forward, backward and update only; None where the
        samples have no ``input_ids`` to count, or there was one step only.
    """
    data, state = trainer.train_dataset, trainer.state
    if not step_seconds or "input_ids" not in (getattr(data, "column_names", None) or ()):
        return {"tokens": None, "tokens_per_second": None}
    lengths = sum(map(len, data["input_ids"]))
    by_step = lengths * state.epoch / max(state.global_step, 1)
    timed = step_seconds[1:]
    return {
        "tokens": by_step * len(step_seconds),
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
