"""Loads and checks recipes: TRL's flat YAML with a ``sparsity:`` block; all problems are reported together."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.errors import ConfigError, DataError, RecipeError
from sparse_unsloth.rank.config import RankConfig, RankError
from sparse_unsloth.training.document import Document, find_recipe, problem_lines
from sparse_unsloth.training.keys import (
    CAUSAL_LM,
    MODEL_DEFAULTS,
    PEFT_METHODS,
    SEQ_CLS,
    check_range,
    did_you_mean,
    key_blocks,
    nearest,
    recipe_keys,
    typed,
)
from sparse_unsloth.training.overrides import Words, parse_overrides, parsed
from sparse_unsloth.utils.saved_adapters import SETTINGS, find_adapter, read_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)

CHECKPOINTING_OPTIONS = (
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers", "offload",
)  # fmt: skip
# A secret, and a key of one start of a run only.
UNSAVED = ("hub_token", "resume_from_checkpoint")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        name: the file's stem.
        given: the keys that the file and the command line set, as plain data.
        training, model, data: the typed blocks made of them.
        sparsity: the sparsity configuration.
        backend: ``"auto"``, ``"unsloth"`` or ``"peft"``.
        rank: the rank-sparse LoRA configuration; None: every rank component is computed.
    """

    name: str
    given: dict[str, Any]
    training: SFTConfig
    model: ModelConfig
    data: DataArguments
    sparsity: SparsityConfig
    backend: str
    rank: RankConfig | None = None

    @property
    def evaluates(self) -> bool:
        """Whether the training evaluates held-out samples."""
        return self.training.eval_strategy != "no" or self.training.do_eval

    def resolved(self) -> dict[str, Any]:
        """Returns its keys as plain data, with every field of the sparsity configuration."""
        resolved = {key: value for key, value in self.given.items() if key not in UNSAVED}
        resolved |= {"backend": self.backend, "output_dir": self.training.output_dir}
        resolved["sparsity"] = self.sparsity.as_dict()
        if self.rank is not None:
            resolved["rank"] = vars(self.rank)
        return resolved

    def save(self, path: str | Path) -> None:
        """Writes a recipe that `load_recipe` reads back to an equal one."""
        Path(path).write_text(yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe file or a shipped recipe; command-line values override its keys.

    Args:
        source: a path, or the name of a shipped recipe.
        overrides: command-line words, ``["--learning_rate", "1e-4", "--sparsity.mlp", '{"1-29": 0.5}']``. Several words
            after a key make a list, no word means ``true``, and dots reach into blocks.

    Raises:
        RecipeError: the recipe does not exist, a key is unknown or a value has a wrong type. Every problem is named
            with its line.
    """
    document = Document(find_recipe(str(source)))
    for path, value in parse_overrides(overrides):
        document.override(path, value)
    return _build(document)


def raw_backend(source: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Reads a recipe's ``backend`` before the recipe is checked, because Unsloth must be imported before TRL.

    "auto" is "peft" where ``use_cpu`` is set, and for sequence classification.

    Raises:
        RecipeError: no such recipe, or it cannot be read.
    """
    values = raw_values(source, overrides)
    backend = values.get("backend", "auto")
    needs_peft = values.get("use_cpu") is True or values.get("lora_task_type") == SEQ_CLS
    return "peft" if backend == "auto" and needs_peft else backend


def raw_values(source: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the values of a recipe's file and command line before they are checked, without those inside blocks.

    Raises:
        RecipeError: as `raw_backend`.
    """
    values = dict(Document(find_recipe(str(source))).values)
    return values | {path[0]: parsed(value) for path, value in parse_overrides(overrides) if len(path) == 1}


def _build(document: Document) -> Recipe:
    name = Path(document.name).stem
    keys, problems, values = recipe_keys(), document.problems, {}
    for key, value in document.values.items():
        place = document.places.get(key, f"{document.name}: {key}")
        if key not in keys:
            problems.append(f"{place}: unknown key{nearest(str(key), keys)}")
        elif key in ("sparsity", "rank"):
            values[key] = value.parsed() if isinstance(value, Words) else value
            if key == "sparsity" and values[key] is False and isinstance(value, Words):
                values[key] = value.value  # as it was written: off, no, false
        else:
            try:
                values[key] = typed(keys[key], value)
                check_range(key, values[key])
            except RecipeError as error:
                problems.append(f"{place}: {error}")
    _adopt_adapter(document, values)
    sparsity = _sparsity(document, values.pop("sparsity", "auto"))
    sparsity = _apply_peft(document, values, sparsity)
    rank = _rank(document, values.pop("rank", None))
    for needed in ("model_name_or_path", "dataset_name"):
        if document.values.get(needed) in (None, ""):
            problems.append(f"{document.name}: {needed} is missing")

    if "output_dir" in values and not values["output_dir"]:
        problems.append(f"{document.places['output_dir']}: must name a folder; leave it out for runs/{name}")

    blocks = {}
    given = dict(values)
    for block, kind in key_blocks().items():
        names = {entry.name for entry in fields(kind) if entry.init}
        chosen = {key: value for key, value in values.items() if key in names}
        if block == "model":
            chosen = {key: value for key, value in MODEL_DEFAULTS.items() if key in names} | chosen | document.adopted
        if block == "training":
            chosen.setdefault("output_dir", f"runs/{name}")
        try:
            blocks[block] = kind(**chosen)
        except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
            problems.append(f"{document.name}: {' '.join(str(error).split())}")
    problems += _unsupported(document.name, blocks.get("model"))
    problems += _ignored_keys(document, blocks.get("training"))
    if problems:
        heading = f"{document.name}: {len(problems)} problem{'s' * (len(problems) > 1)}"
        raise RecipeError("\n  ".join([heading, *problems]))
    return Recipe(name, _plain(given), sparsity=sparsity, rank=rank, backend=values.get("backend", "auto"), **blocks)


def _apply_peft(document: Document, values: dict[str, Any], sparsity: SparsityConfig | None) -> SparsityConfig | None:
    """Sets the keys that ``peft`` stands for; DoRA is trained densely."""
    method = values.pop("peft", None)
    if method is None:
        return sparsity
    for key, wanted in PEFT_METHODS[method].items():
        if values.setdefault(key, wanted) != wanted:
            document.problems.append(
                f"{document.places['peft']}: {method} contradicts {key}: {str(values[key]).lower()}; leave one out"
            )
    if method != "dora" or sparsity is None:
        return sparsity
    if not (sparsity.mlp or sparsity.self_attn or sparsity.preset or sparsity.row_sparse):
        return sparsity
    if sparsity.is_auto:
        return SparsityConfig(preset="dense")
    logger.warning("peft: dora: the published baseline, so it is trained densely; row sparsity takes use_dora: true.")
    return sparsity.whole_rows().model_copy(update={"preset": "dense", "mlp": {}, "self_attn": {}})


def _ignored_keys(document: Document, training: SFTConfig | None) -> list[str]:
    """Finds settings that transformers ignores, or refuses only after the model is loaded."""
    if training is None:
        return []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    def place(key: str) -> str:
        return document.places.get(key, f"{document.name}: {key}")

    problems = []
    if training.load_best_model_at_end and training.eval_strategy == "no":
        problems.append(f"{place('load_best_model_at_end')}: needs eval_strategy and save_strategy: steps or epoch")
    if training.restore_callback_states_from_checkpoint:
        problems.append(f"{place('restore_callback_states_from_checkpoint')}: a run restores its own; leave it out")
    for name in training.gradient_checkpointing_kwargs or ():
        if name not in CHECKPOINTING_OPTIONS:
            near = did_you_mean(str(name), CHECKPOINTING_OPTIONS)
            problems.append(f"{place('gradient_checkpointing_kwargs')}: {name}: unknown option{near}")
    valid = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    asked = training.report_to or []
    return problems + [
        f"{place('report_to')}: there is no integration {name!r}{did_you_mean(str(name), valid)}; there are "
        f"{', '.join(valid)}"
        for name in ([asked] if isinstance(asked, str) else asked)
        if name not in valid
    ]


def _sparsity(document: Document, value: Any) -> SparsityConfig | None:
    try:
        return SparsityConfig.from_any(value)
    except ConfigError as error:
        document.problems += problem_lines(error, document.places.get("sparsity", document.name))
        return None


def _rank(document: Document, value: Any) -> RankConfig | None:
    try:
        return RankConfig.from_any(value)
    except RankError as error:
        problem = f"{document.places.get('rank', document.name)}: {str(error).removeprefix('rank: ')}"
        hint = "" if isinstance(value, Mapping) else " The estimator's rank is sparsity.estimator.rank, LoRA's lora_r."
        document.problems.append(problem + hint)
        return None


def _unsupported(name: str, model: ModelConfig | None) -> list[str]:
    if model is None:
        return []
    problems = []
    if not model.use_peft:
        problems.append(
            f"{name}: use_peft: false: sparse-unsloth trains LoRA adapters; for full training use `trl sft`"
        )
    if model.lora_task_type not in (CAUSAL_LM, SEQ_CLS):
        problems.append(f"{name}: lora_task_type: must be {CAUSAL_LM} or {SEQ_CLS}, given {model.lora_task_type!r}")
    if model.load_in_8bit:
        problems.append(f"{name}: load_in_8bit: has no sparse path; use load_in_4bit, or neither")
    if model.lora_target_modules == []:
        problems.append(f"{name}: lora_target_modules: names no module; leave it out for all projections")
    if model.lora_target_parameters:
        problems.append(f"{name}: lora_target_parameters: has no sparse path; use lora_target_modules")
    return problems


def _adopt_adapter(document: Document, values: dict[str, Any]) -> None:
    """Takes the defaults of keys from the adapter, where the model is an adapter's folder.

    These keys are not saved with the recipe, because the adapter holds them.
    """
    name = values.get("model_name_or_path")
    if not isinstance(name, str):
        return
    try:
        adapter = find_adapter(name)
        settings = {} if adapter is None else read_settings(adapter)
    except DataError as error:
        document.problems.append(str(error))
        return
    method = PEFT_METHODS.get(values.get("peft"), {})
    for key, theirs in SETTINGS.items():
        found = settings.get(theirs)
        if found is None:
            continue
        asked = values.get(key, method.get(key, found) if key == "use_dora" else found)
        if not _same_setting(asked, found):
            document.problems.append(
                f"{document.places.get(key, document.name)}: the adapter in {adapter} was made with {found!r}, and "
                f"training goes on with that: leave {key} out, or begin from the base model "
                f"({settings['base_model_name_or_path']})"
            )
        document.adopted[key] = found


def _same_setting(asked: Any, found: Any) -> bool:
    if asked in ("all-linear", ["all-linear"]):
        return True
    if isinstance(asked, list) and isinstance(found, list):
        return sorted(asked) == sorted(found)
    return asked == found or (not asked and not found)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Converts values to types of YAML."""
    return json.loads(json.dumps(values, default=str))
