"""Runs a recipe through TRL's ``SFTTrainer`` and writes the run folder.

Importing this module imports TRL. With the Unsloth backend, Unsloth must come before it, as on the command line.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainerCallback
from trl import SFTTrainer

from sparse_unsloth.backends.choose import explain_backend
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.data.datasets import length_filter, load_dataset_for
from sparse_unsloth.data.ledger import HELD_OUT, TRAINING, Ledger, settle
from sparse_unsloth.data.smollm2 import resolve_base, resolve_model
from sparse_unsloth.data.templates import not_written
from sparse_unsloth.errors import BackendError, DataError, RecipeError
from sparse_unsloth.explain.records import RECORDS_FILE
from sparse_unsloth.explain.report import write as write_explanation
from sparse_unsloth.language_model import TARGET_MODULES, FastSparseLanguageModel
from sparse_unsloth.rank import apply as apply_rank
from sparse_unsloth.rank import save_pruned_checkpoint
from sparse_unsloth.tokens.partition import EVERY_TOKEN_BEARS_LOSS, ROLES_COME_FROM
from sparse_unsloth.training.keys import SEQ_CLS
from sparse_unsloth.training.recipe import Recipe
from sparse_unsloth.training.requirements import check_can_train
from sparse_unsloth.training.resume import (
    ENVIRONMENT_FILE,
    ESTIMATOR_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    begin,
    data_digest,
    finished_metrics,
    is_complete,
    resume_state,
)
from sparse_unsloth.training.step_times import StepTimer, forget_peak_memory, throughput
from sparse_unsloth.utils.checkpoints import read_state
from sparse_unsloth.utils.distributed import from_main, is_main, world_size
from sparse_unsloth.utils.environment import environment
from sparse_unsloth.utils.faults import SetUp
from sparse_unsloth.utils.saved_adapters import ADAPTER_FOLDER, check_targets, find_adapter, is_lost, named_targets
from sparse_unsloth.utils.unreadable import first_line

logger = logging.getLogger("sparse_unsloth")

PRUNED_FOLDER = "adapter-pruned"
BNB_KEYS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass(frozen=True)
class RunResult:
    """The result of a run; `metrics` is also written to the run folder.

    ``trained`` is False where the run was finished before, so that nothing was done.
    """

    folder: Path
    metrics: dict[str, Any]
    trained: bool = True


def run(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = ()) -> RunResult:
    """Trains ``recipe`` and writes recipe, adapter, metrics and environment to its ``output_dir``.

    Nothing is written before the first step. A finished run that is resumed does not change. Losses and times in the
    metrics are those of the whole run, including the parts before interruptions. Where channel choices were sampled
    (``explain_steps``), the report of `sparse-unsloth explain` is written too.

    Raises:
        SparsityError: this machine cannot train the recipe, the folder holds another run, or model or data cannot be
            loaded.
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
            planned, done = _planned_steps(trainer), finished_metrics(folder)
            if done is not None and done["steps"] >= planned and is_complete(recipe, done):
                return _nothing_to_do(folder, done)
            before = resume_state(checkpoint, timer.data, planned)

        def begin_to_write() -> None:
            setup.over = True
            if trainer.is_world_process_zero():
                _begin_folder(recipe, folder, planned)

        timer.begins = begin_to_write
        timer.start(trainer, before)
        forget_peak_memory()
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
            # Last, so that training and figures are saved should it fail.
            metrics["evaluation"] = trainer.evaluate()
            if trainer.is_world_process_zero():
                _write_json(folder / METRICS_FILE, metrics)
    return RunResult(folder, metrics)


def _begin_folder(recipe: Recipe, folder: Path, planned: int | None) -> None:
    """Writes the files that a run's folder has from the first step; figures of a shorter, finished run are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    done = finished_metrics(folder)
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
    """Builds the trainer of ``recipe``: model attached, data loaded, steps timed.

    It draws no bar where standard error is no terminal, unless the recipe gives ``disable_tqdm``.

    Args:
        recipe: what to train; TRL's ``SFTTrainer`` trains text, transformers' ``Trainer`` a classifier (SEQ_CLS).
        callbacks: added to the timer.
        checkpoint: the checkpoint to resume from; the estimator beside it is reused.

    Raises:
        SparsityError: see `run`.
    """
    if "disable_tqdm" not in recipe.given and not sys.stderr.isatty():
        recipe.training.disable_tqdm = True  # the trainer then prints its log lines alone
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
        recipe.data, recipe.evaluates, training.completion_only_loss, fits, training.dataset_text_field, ledger
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
    train_data, test_data, columns = classification.load_labelled(recipe.data, recipe.evaluates, ledger)
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
    """Refuses a training without a step; warns of unused samples, and of a learning rate that is never reached.

    Raises:
        DataError: there is no full batch, and only full batches are trained.
    """
    training, data = trainer.args, trainer.train_dataset
    held_out = ledger.split(TRAINING).set_aside.get(HELD_OUT)
    if held_out and not recipe.evaluates:
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


def _load(recipe: Recipe, backend: str, checkpoint: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """Loads the recipe's model and tokenizer; an adapter is loaded with its base and gets the recipe's sparsity.

    Raises:
        DataError: model or tokenizer cannot be loaded.
    """
    training, arguments = recipe.training, recipe.model
    options = {**(training.model_init_kwargs or {}), **options}
    # TRL applies these to a model's name only, and this model is loaded already.
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
    """Returns the model with adapters and sparse paths, and the timer of its steps; an existing adapter is kept."""
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


def _planned_steps(trainer: Trainer) -> int:
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _check_context_exists(recipe: Recipe, columns: list[str]) -> None:
    """Refuses data in which every token is a loss token: the training would silently be dense.

    Raises:
        DataError: context tokens cannot be told from loss tokens.
    """
    training, sparsity = recipe.training, recipe.sparsity
    asked = sparsity.row_sparse or sparsity.mlp or sparsity.self_attn or sparsity.preset not in (None, "dense", "auto")
    masked = training.assistant_only_loss or ("completion" in columns and training.completion_only_loss is not False)
    masked = masked or bool({"labels", "completion_mask", "assistant_masks"} & set(columns))
    if training.completion_only_loss and not masked:
        raise DataError(
            f"completion_only_loss: the samples of {recipe.data.dataset_name} have no completion "
            f"({', '.join(columns)}), so every token would be a loss token. Give prompt and completion, or "
            "assistant_only_loss: true for conversations; or leave it out."
        )
    if asked and sparsity.dense_tokens == "output" and not masked:
        raise DataError(
            f"{recipe.data.dataset_name}: with the columns {', '.join(columns)} {EVERY_TOKEN_BEARS_LOSS} Use "
            f"{ROLES_COME_FROM}, or sparsity: dense."
        )


def _with_estimator_path(recipe: Recipe, checkpoint: str | None) -> SparsityConfig:
    """Stores estimator factors in the run folder, so that a resumed run uses the same ones."""
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
