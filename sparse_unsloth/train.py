"""Runs a recipe through TRL's ``SFTTrainer`` and writes the run folder.

Importing this module imports TRL. With the Unsloth backend, Unsloth must come before it, as on the command line.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from sparse_unsloth.checkpoints import last_whole_checkpoint
from sparse_unsloth.config import SparsityConfig
from sparse_unsloth.data import DataError, load_dataset_for, resolve_model
from sparse_unsloth.doctor import check_can_train, environment
from sparse_unsloth.language_model import TARGET_MODULES, FastSparseLanguageModel, explain_backend
from sparse_unsloth.rank import apply as apply_rank
from sparse_unsloth.rank import save_pruned_checkpoint
from sparse_unsloth.recipe import Recipe, RecipeError

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
        self._any_sparse = any(any(layer) for layer in sparsity.layer_sparsity(num_layers))
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

    Raises:
        SparsityError: this machine cannot train it, the folder holds another run, or model or data are out of reach.
    """
    check_can_train(recipe.training.use_cpu)
    checkpoint = _checkpoint(recipe)
    trainer, timer = build_trainer(recipe, callbacks, checkpoint)
    folder = Path(recipe.training.output_dir)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(folder / RECIPE_FILE)
        _write_json(folder / ENVIRONMENT_FILE, environment())
    timer.start()
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.save_model(str(folder / ADAPTER_FOLDER))
    metrics = {
        "steps": outcome.global_step,
        "train_loss": outcome.training_loss,
        "train_seconds": seconds,
        "setup_seconds": timer.setup_seconds,
        "median_step_seconds": {kind: timer.times.median(kind == "sparse") for kind in ("dense", "sparse")},
        "step_times": asdict(timer.times),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        if recipe.rank is not None and recipe.rank.retain_ratio is not None:
            save_pruned_checkpoint(trainer.model, folder / PRUNED_FOLDER, recipe.rank.retain_ratio)
        _write_json(folder / METRICS_FILE, metrics)
    return RunResult(folder, metrics)


def build_trainer(
    recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = (), checkpoint: str | None = None
) -> tuple[SFTTrainer, StepTimer]:
    """The trainer of ``recipe`` with its model attached, data loaded and steps timed.

    Args:
        recipe: what to train.
        callbacks: beside the timer.
        checkpoint: the one that will be resumed from; the estimator that lies beside it is used again.

    Raises:
        SparsityError: see `run`.
    """
    training, arguments = recipe.training, recipe.model
    evaluation = training.eval_strategy != "no" or training.do_eval
    train_data, test_data = load_dataset_for(recipe.data, evaluation, training.completion_only_loss)
    _check_context_exists(recipe, train_data.column_names)

    options: dict[str, Any] = dict(training.model_init_kwargs or {})
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
    checkpointing = "unsloth" if training.gradient_checkpointing else False
    backend = "peft" if training.use_cpu and recipe.backend == "auto" else recipe.backend
    try:
        model, tokenizer = FastSparseLanguageModel.from_pretrained(
            resolve_model(arguments.model_name_or_path),
            dtype=None if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype),
            load_in_4bit=arguments.load_in_4bit,
            backend=explain_backend(backend)[0],
            revision=arguments.model_revision,
            trust_remote_code=training.trust_remote_code,
            use_gradient_checkpointing=checkpointing,
            random_state=training.seed,
            **options,
        )
    except OSError as error:
        raise DataError(
            f"model_name_or_path: {arguments.model_name_or_path!r} cannot be loaded; it must be a folder with a "
            "transformers "
            f"checkpoint, or a hub name that can be reached from here.\n{error}"
        ) from error
    model = FastSparseLanguageModel.get_peft_model(
        model,
        r=arguments.lora_r,
        target_modules=arguments.lora_target_modules or TARGET_MODULES,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        modules_to_save=arguments.lora_modules_to_save,
        use_gradient_checkpointing=checkpointing,
        random_state=training.seed,
        sparsity=_with_estimator_path(recipe, checkpoint),
        **({"use_dora": True} if arguments.use_dora else {}),
    )
    if recipe.rank is not None:
        apply_rank(model, **vars(recipe.rank))
    timer = StepTimer(recipe.sparsity, model.config.get_text_config().num_hidden_layers)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=training,
        train_dataset=train_data,
        eval_dataset=test_data,
        callbacks=[timer, *callbacks],
    )
    return trainer, timer


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
    asked = sparsity.mlp or sparsity.self_attn or sparsity.preset not in (None, "dense")
    masked = training.assistant_only_loss or ("completion" in columns and training.completion_only_loss is not False)
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


def _now() -> float:
    """The clock, after what runs on the accelerator has come to an end."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
