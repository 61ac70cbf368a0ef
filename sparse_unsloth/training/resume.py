"""Examines a run's folder: whether the run is finished, and the checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from sparse_unsloth.errors import RecipeError
from sparse_unsloth.training.keys import recipe_keys
from sparse_unsloth.training.recipe import Recipe, raw_values
from sparse_unsloth.training.step_times import StepTimer
from sparse_unsloth.utils.checkpoints import (
    check_checkpoint,
    damage,
    last_whole_checkpoint,
    read_state,
    stored_checkpoints,
)
from sparse_unsloth.utils.distributed import world_size
from sparse_unsloth.utils.faults import check_output
from sparse_unsloth.utils.saved_adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, SETTINGS

logger = logging.getLogger("sparse_unsloth")

RECIPE_FILE, METRICS_FILE, ENVIRONMENT_FILE = "recipe.yaml", "metrics.json", "environment.json"
ESTIMATOR_FILE = "estimator.safetensors"
UNIMPORTANT = (
    "output_dir", "run_name", "resume_from_checkpoint", "disable_tqdm", "report_to", "trackio", "project", "hub_",
    "push_to", "log_", "logging_", "save_", "eval_", "do_", "per_device_eval", "metric_for", "greater_is", "load_best",
    "dataloader_", "dataset_num_proc", "extends", "include_", "use_cpu", "debug", "skip_memory",
)  # fmt: skip
"""Prefixes of keys that do not change what a training step computes."""


def begin(recipe: Recipe) -> tuple[str | None, dict[str, Any] | None]:
    """Returns ``(checkpoint to resume from, metrics of a finished run)`` of the run's folder; each may be None.

    Settings that differ from those of the resumed run are logged. Called on one process.

    Raises:
        SparsityError: the folder holds another run, cannot be written to or has no checkpoint to resume from, or the
            checkpoint does not fit.
    """
    asked, folder = recipe.training.resume_from_checkpoint, Path(recipe.training.output_dir)
    check_output(folder, "output_dir")
    finished = finished_metrics(folder)
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
        # A run that ended before its first checkpoint left these, perhaps on other data.
        (folder / ESTIMATOR_FILE).unlink(missing_ok=True)
        return None, None
    began = (folder if in_folder else checkpoint.parent) / RECIPE_FILE
    changes = changed_settings(began, recipe) if began.is_file() else {}
    if in_folder and finished is not None:
        steps = recipe.training.max_steps
        # The number of steps of an epoch depends on the data: `run` checks again.
        longer = (changes or not began.is_file()) and (finished["steps"] < steps or steps < 0)
        if not longer and is_complete(recipe, finished):
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
    """Compares ``recipe`` with the run's ``recipe.yaml``; returns ``{key: (was, is)}``, with the keys inside blocks.

    Keys that do not change the training (`UNIMPORTANT`) are left out.
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
    """Warns of settings that changed since the run began.

    Raises:
        RecipeError: the checkpoint's adapter does not fit the new settings.
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


def resume_state(checkpoint: str, data: str | None, planned: int) -> dict[str, Any] | None:
    """Reads what `StepTimer.state` stored in the checkpoint; changed data or process counts are logged."""
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


def finished_metrics(folder: Path) -> dict[str, Any] | None:
    """Reads the metrics of a finished run; None where the run is not finished.

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


def is_complete(recipe: Recipe, metrics: dict[str, Any]) -> bool:
    """Whether a run with these ``metrics`` has its adapter, and its evaluation if the recipe asks for one."""
    folder = Path(recipe.training.output_dir)
    evaluated = "evaluation" in metrics or not recipe.evaluates or not stored_checkpoints(folder)
    return evaluated and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()


def data_digest(data: Any) -> str | None:
    """Digests the samples' token ids and their order; None where they cannot be read again, as in streams."""
    if "input_ids" not in (getattr(data, "column_names", None) or ()) or not isinstance(data, Dataset):
        return None
    # Row by row, so that the digest does not depend on Arrow's chunks of the column.
    lengths, values = hashlib.sha256(), hashlib.sha256()
    for table in data.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        for chunk in table["input_ids"].chunks:
            lengths.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            values.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return f"{lengths.hexdigest()[:8]}{values.hexdigest()[:16]}"
