"""Recipes: TRL's own flat YAML and a ``sparsity:`` block, checked key by key, all problems reported together."""

from __future__ import annotations

import difflib
import enum
import functools
import importlib.resources
import json
import logging
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from sparse_unsloth import removed
from sparse_unsloth.config import EstimatorConfig, SparsityConfig
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.errors import ConfigError, DataError, SparsityError
from sparse_unsloth.rank.config import RankConfig, RankError
from sparse_unsloth.saved_adapters import SETTINGS, find_adapter, read_settings

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from trl import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)

# Where sparse training needs another default than TRL's: adapters, no dropout on them, the checkpoint's own dtype.
MODEL_DEFAULTS = {"use_peft": True, "lora_dropout": 0.0, "dtype": "auto"}
BACKENDS = ("auto", "unsloth", "peft")
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
# What each value of the key `peft` sets.
PEFT_METHODS = {
    "lora": {"load_in_4bit": False, "use_dora": False},
    "qlora": {"load_in_4bit": True, "use_dora": False},
    "dora": {"load_in_4bit": False, "use_dora": True},
}
SUFFIXES = (".yaml", ".yml")
CHECKPOINTING_OPTIONS = (
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers", "offload",
)  # fmt: skip
DEVICES = ("device", "devices", "gpu", "gpus", "cuda", "cpu", "device_map", "no_cuda", "gpu_ids")
"""Keys that users try, and that no block has."""
# A secret, and what belongs to one start of a run only.
UNSAVED = ("hub_token", "resume_from_checkpoint")


class RecipeError(SparsityError):
    """A recipe, or a value given on the command line, that cannot be used; the message lists every problem."""


@dataclass(frozen=True)
class Key:
    """One key that a recipe may hold."""

    name: str
    kind: Any
    default: Any
    help: str
    owner: str


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        name: the file's stem.
        given: the keys that the file and the command line set, as plain data.
        training, model, data: the typed blocks that they fill.
        sparsity: what is sparse, and when.
        backend: ``"auto"``, ``"unsloth"`` or ``"peft"``.
        rank: which rank components of the adapter are computed; None: all of them.
    """

    name: str
    given: dict[str, Any]
    training: SFTConfig
    model: ModelConfig
    data: DataArguments
    sparsity: SparsityConfig
    backend: str
    rank: RankConfig | None = None

    def resolved(self) -> dict[str, Any]:
        """Its keys as plain data, the sparsity spelled out in full."""
        resolved = {key: value for key, value in self.given.items() if key not in UNSAVED}
        resolved |= {"backend": self.backend, "output_dir": self.training.output_dir}
        resolved["sparsity"] = self.sparsity.model_dump(mode="json")
        if self.rank is not None:
            resolved["rank"] = vars(self.rank)
        return resolved

    def save(self, path: str | Path) -> None:
        """Writes a recipe that `load_recipe` reads back to an equal one."""
        Path(path).write_text(yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def shipped_recipes() -> dict[str, Traversable]:
    """The recipes that come with the package, by name."""
    folder = importlib.resources.files("sparse_unsloth") / "recipes"
    found = {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(SUFFIXES)}
    return dict(sorted(found.items()))


def find_recipe(source: str) -> Traversable:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        RecipeError: there is none.
    """
    if source.endswith(SUFFIXES) or "/" in source:
        path = Path(source)
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {source} (looked for in {Path.cwd()}).")
        return path
    shipped = shipped_recipes()
    if source not in shipped:
        hint = _did_you_mean(source, shipped) or "."
        raise RecipeError(
            f"there is no shipped recipe {source!r}{hint} Shipped: {', '.join(shipped)}; a file's name ends in .yaml."
        )
    return shipped[source]


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe file, or one that is shipped, and puts command-line values over it.

    Args:
        source: a path, or the name of a shipped recipe.
        overrides: command-line words, ``["--learning_rate", "1e-4", "--sparsity.mlp", '{"1-29": 0.5}']``. Several words
            after one key make a list, none is ``true``, and dots reach into blocks.

    Raises:
        RecipeError: no such recipe, unknown keys, values of a wrong type: every problem with the line where it stands.
    """
    document = _Document(find_recipe(str(source)))
    for path, value in parse_overrides(overrides):
        document.override(path, value)
    return _build(document)


def raw_backend(source: str | Path, overrides: Iterable[str] = ()) -> Any:
    """The ``backend`` that a recipe asks for, before anything is checked: Unsloth must be imported before TRL is.

    "auto" is "peft" where ``use_cpu`` is set, and for sequence classification.

    Raises:
        RecipeError: no such recipe, or it cannot be read.
    """
    values = raw_values(source, overrides)
    backend = values.get("backend", "auto")
    needs_peft = values.get("use_cpu") is True or values.get("lora_task_type") == SEQ_CLS
    return "peft" if backend == "auto" and needs_peft else backend


def raw_values(source: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a recipe's file and the command line set, before anything is checked; no values inside blocks.

    Raises:
        RecipeError: as `raw_backend`.
    """
    values = dict(_Document(find_recipe(str(source))).values)
    return values | {path[0]: _parsed(value) for path, value in parse_overrides(overrides) if len(path) == 1}


def parse_overrides(words: Iterable[str]) -> list[tuple[tuple[str, ...], Any]]:
    """``--key value ...`` into pairs of a key's path and its raw value (a text, a list of texts, or True).

    Raises:
        RecipeError: a value that no key comes before.
    """
    parsed: list[tuple[tuple[str, ...], list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            first, *rest = name.split(".")
            parsed.append(((first.replace("-", "_"), *rest), [value] if equals else []))
        elif parsed:
            parsed[-1][1].append(word)
        else:
            raise RecipeError(f"command line: {word!r} stands before any --key; a recipe is one name or one file.")
    return [(path, True if not values else values[0] if len(values) == 1 else values) for path, values in parsed]


def recipe_keys() -> dict[str, Key]:
    """Every key that a recipe may hold, by name; importing TRL takes seconds, so it is done here, at the first call."""
    keys = {"backend": Key("backend", Literal[BACKENDS], "auto", "What runs the model.", "sparse_unsloth")}
    keys["sparsity"] = Key(
        "sparsity", Any, None, "A preset (rows, o1, o2, dense), a file, or a block of SparsityConfig.", "sparse_unsloth"
    )
    keys["extends"] = Key(
        "extends", str, None, "A recipe (a file beside this one, or a shipped one) whose keys this one changes.", "-"
    )
    keys["peft"] = Key(
        "peft",
        Literal[tuple(PEFT_METHODS)] | None,
        None,
        "lora, qlora (sets load_in_4bit) or dora (sets use_dora, and trains densely: it has no exact sparse path).",
        "sparse_unsloth",
    )
    keys["rank"] = Key(
        "rank", Any, None, "A block of RankConfig: compute only the rank components that matter.", "sparse_unsloth"
    )
    for block in _blocks().values():
        hints = typing.get_type_hints(block)
        for entry in fields(block):
            if not entry.init:
                continue
            default = entry.default if entry.default is not MISSING else None
            if entry.default_factory is not MISSING:
                default = entry.default_factory()
            default = MODEL_DEFAULTS.get(entry.name, default)
            choices = entry.metadata.get("choices")
            kind = _enums_only(hints[entry.name]) if not choices else Literal[tuple(choices)]
            if choices and default is None:
                kind = kind | None
            if entry.name == "resume_from_checkpoint":
                kind = bool | kind
            keys[entry.name] = Key(entry.name, kind, default, entry.metadata.get("help", ""), block.__name__)
    return keys


@functools.cache
def _blocks() -> dict[str, type]:
    from trl import ModelConfig, SFTConfig

    return {"data": DataArguments, "model": ModelConfig, "training": SFTConfig}


class _Document:
    """A recipe's values, those of the recipe that it extends included, and where each of its keys stands."""

    def __init__(self, entry: Traversable, extended_by: tuple[str, ...] = ()):
        self.name = name = entry.name
        self.problems: list[str] = []
        self.adopted: dict[str, Any] = {}  # of the adapter that training goes on with
        try:
            text = entry.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.values: dict[str, Any] = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise RecipeError(yaml_problem(name, error)) from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: cannot be read as YAML: it is not UTF-8 text ({error}).") from None
        if not isinstance(self.values, dict):
            raise RecipeError(f"{name}: must hold a mapping of keys, but holds a {type(self.values).__name__}.")
        self.places: dict[str, str] = {}
        for key, _ in root.value if root is not None else ():
            place = f"{name}:{key.start_mark.line + 1}: {key.value}"
            if key.value in self.places:
                self.problems.append(f"{place}: given twice, first as {self.places[key.value]}")
            self.places[key.value] = place
        self.problems += [
            problem for _, block in (root.value if root is not None else ()) for problem in _twice(name, block)
        ]
        self._resolve_sparsity_file(entry)
        if "extends" in self.values:
            self._extend(entry, (*extended_by, name))

    def _extend(self, entry: Traversable, chain: tuple[str, ...]) -> None:
        """Puts the keys of the recipe named by ``extends`` under this one's; blocks are replaced as a whole.

        Raises:
            RecipeError: there is none, it cannot be read, or it extends this one in turn.
        """
        source, place = self.values.pop("extends"), self.places.pop("extends")
        if not isinstance(source, str):
            raise RecipeError(f"{place}: must be the name or the file of a recipe, given {source!r}")
        beside = entry.parent / source if isinstance(entry, Path) else None
        try:
            base = beside if beside is not None and beside.is_file() else find_recipe(source)
        except RecipeError as error:
            raise RecipeError(f"{place}: {error}") from None
        if base.name in chain:
            raise RecipeError(f"{place}: recipes extend each other in a circle: {' -> '.join([*chain, base.name])}.")
        under = _Document(base, chain)
        self.problems += under.problems
        self.values, self.places = under.values | self.values, under.places | self.places

    def _resolve_sparsity_file(self, entry: Traversable) -> None:
        sparsity = self.values.get("sparsity")
        if (
            isinstance(sparsity, str)
            and isinstance(entry, Path)
            and (entry.parent / sparsity.partition("#")[0]).is_file()
        ):
            # A file named in a recipe is looked for beside the recipe first.
            self.values["sparsity"] = str(entry.parent / sparsity)

    def override(self, path: tuple[str, ...], value: Any) -> None:
        key = path[0]
        place = f"command line: --{'.'.join(path)}"
        if len(path) == 1:
            self.places[key], self.values[key] = place, _Words(value)
            return
        self.places[key] = f"{self.places[key]}, {place}" if key in self.places else place
        block = self.values.get(key)
        if isinstance(block, _Words):
            block = block.parsed()
        if key == "sparsity" and isinstance(block, str):
            try:
                block = SparsityConfig.from_any(block).model_dump(mode="json", exclude_defaults=True)
            except ConfigError as error:
                self.problems += _lines(error, self.places[key])
                block = {}
        # A copy: the block may be shared with a YAML anchor elsewhere.
        self.values[key] = block = dict(block) if isinstance(block, Mapping) else {}
        for name in path[1:-1]:
            block[name] = block = dict(block.get(name) or {})
        block[path[-1]] = _parsed(value)


def yaml_problem(name: str, error: yaml.YAMLError) -> str:
    """One line: file, line and column, and what is wrong there."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    return (
        f"{place}: cannot be read as YAML: {', '.join(part for part in said if part) or ' '.join(str(error).split())}."
    )


def _twice(name: str, node: yaml.Node) -> list[str]:
    """Keys that a block holds twice, of which YAML keeps the last without a word."""
    problems, seen = [], {}
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            place = f"{name}:{key.start_mark.line + 1}: {key.value}"
            if key.value in seen:
                problems.append(f"{place}: given twice, first as {seen[key.value]}")
            seen[key.value] = place
        problems += _twice(name, value)
    return problems


class _Words:
    """A command-line value, not yet known to be a text or YAML."""

    def __init__(self, value: Any):
        self.value = value

    def parsed(self) -> Any:
        return _parsed(self.value)


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _build(document: _Document) -> Recipe:
    name = Path(document.name).stem
    keys, problems, values = recipe_keys(), document.problems, {}
    for key, value in document.values.items():
        place = document.places.get(key, f"{document.name}: {key}")
        if key not in keys:
            problems.append(f"{place}: unknown key{_nearest(str(key), keys)}")
        elif key in ("sparsity", "rank"):
            values[key] = value.parsed() if isinstance(value, _Words) else value
            if key == "sparsity" and values[key] is False and isinstance(value, _Words):
                values[key] = value.value  # as it was written: off, no, false
        else:
            try:
                values[key] = _typed(keys[key], value)
                _check_range(key, values[key])
            except RecipeError as error:
                problems.append(f"{place}: {error}")
    _adopt_adapter(document, values)
    sparsity = _sparsity(document, values.pop("sparsity", None))
    sparsity = _apply_peft(document, values, sparsity)
    rank = _rank(document, values.pop("rank", None))
    for needed in ("model_name_or_path", "dataset_name"):
        if document.values.get(needed) in (None, ""):
            problems.append(f"{document.name}: {needed} is missing")

    if "output_dir" in values and not values["output_dir"]:
        problems.append(f"{document.places['output_dir']}: must name a folder; leave it out for runs/{name}")

    blocks = {}
    given = dict(values)
    for block, kind in _blocks().items():
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
    problems += _unheard(document, blocks.get("training"))
    if problems:
        heading = f"{document.name}: {len(problems)} problem{'s' * (len(problems) > 1)}"
        raise RecipeError("\n  ".join([heading, *problems]))
    return Recipe(name, _plain(given), sparsity=sparsity, rank=rank, backend=values.get("backend", "auto"), **blocks)


def _apply_peft(document: _Document, values: dict[str, Any], sparsity: SparsityConfig | None) -> SparsityConfig | None:
    """Sets what the key ``peft`` stands for; DoRA's baseline is dense."""
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
    if not (sparsity.mlp or sparsity.self_attn or sparsity.preset or sparsity.by_rows):
        return sparsity
    logger.warning("peft: dora: it has no exact sparse path, so it is trained densely, as the published baseline.")
    return sparsity.whole_rows().model_copy(update={"preset": "dense", "mlp": {}, "self_attn": {}})


def _unheard(document: _Document, training: SFTConfig | None) -> list[str]:
    """What transformers passes over, or refuses only after the model is loaded."""
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
            near = _did_you_mean(str(name), CHECKPOINTING_OPTIONS)
            problems.append(f"{place('gradient_checkpointing_kwargs')}: {name}: unknown option{near}")
    valid = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    asked = training.report_to or []
    return problems + [
        f"{place('report_to')}: there is no integration {name!r}{_did_you_mean(str(name), valid)}; there are "
        f"{', '.join(valid)}"
        for name in ([asked] if isinstance(asked, str) else asked)
        if name not in valid
    ]


def _did_you_mean(given: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _sparsity(document: _Document, value: Any) -> SparsityConfig | None:
    try:
        return SparsityConfig.from_any(value)
    except ConfigError as error:
        document.problems += _lines(error, document.places.get("sparsity", document.name))
        return None


def _rank(document: _Document, value: Any) -> RankConfig | None:
    try:
        return RankConfig.from_any(value)
    except RankError as error:
        problem = f"{document.places.get('rank', document.name)}: {str(error).removeprefix('rank: ')}"
        hint = "" if isinstance(value, Mapping) else " The estimator's rank is sparsity.estimator.rank, LoRA's lora_r."
        document.problems.append(problem + hint)
        return None


def _lines(error: ConfigError, place: str) -> list[str]:
    """A configuration error's problems, each with the place of the block."""
    first, *others = str(error).split("\n")
    return [f"{place}: {line.strip()}" for line in others or [first.removeprefix("sparsity configuration: ")]]


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


_COUNT = (lambda x: x >= 1, "1 or more")
_FROM_0 = (lambda x: x >= 0, "0 or more")
_ABOVE_0 = (lambda x: x > 0, "above 0")
_SHARE = (lambda x: 0 <= x <= 1, "from 0 to 1")
_PART = (lambda x: 0 <= x < 1, "0 or more and below 1")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda x: 0 < x <= 1, "above 0 and at most 1 (usually 1e-5 to 1e-3)"),
    "max_steps": (lambda x: x == -1 or x >= 1, "1 or more, or -1 for num_train_epochs"),
    **dict.fromkeys(
        (
            "lora_r", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "max_length", "save_total_limit", "eval_accumulation_steps", "dataset_num_proc",
        ),
        _COUNT,
    ),
    "dataset_size": (lambda x: x >= 1, "1 or more, or null for all"),
    "dataset_test_size": (lambda x: x >= 1, "1 or more, or null for none"),
    **dict.fromkeys(("lora_alpha", "num_train_epochs", "save_steps", "logging_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(
        (
            "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha", "seed", "data_seed",
            "dataset_seed", "dataloader_num_workers", "eval_delay",
        ),
        _FROM_0,
    ),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), _PART),
    "warmup_ratio": _SHARE,
}  # fmt: skip
"""What values the libraries take without a word, or refuse late and badly: the test, and how it reads."""


def _check_range(key: str, value: Any) -> None:
    if key not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return
    fits, words = RANGES[key]
    if not math.isfinite(value) or not fits(value):
        raise RecipeError(f"must be {words}, given {value}")


def _adopt_adapter(document: _Document, values: dict[str, Any]) -> None:
    """Where the model is an adapter's folder: what that adapter is, in place of the keys' defaults.

    Such keys stay out of the saved recipe; the adapter says them again.
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


def _typed(key: Key, value: Any) -> Any:
    """``value`` in the key's type. Command-line words are tried as YAML first, then as a text."""
    candidates = [value]
    if isinstance(value, _Words):
        candidates = [value.parsed(), value.value]
    if _takes_only_lists(key.kind):
        # As TRL's parser does: `lora_target_modules: all-linear` is a list of one.
        candidates += [[candidate] for candidate in candidates if isinstance(candidate, str)]
    adapter = TypeAdapter(key.kind, config={"arbitrary_types_allowed": True})
    for candidate in candidates:
        # YAML reads a bare no (eval_strategy: no) as false.
        if candidate is False and "no" in _choices(key.kind):
            candidate = "no"
        if isinstance(candidate, bool) and not _takes_bool(key.kind):
            continue
        try:
            result = adapter.validate_python(candidate)
        except ValidationError:
            continue
        # TRL's own parser gives these fields plain texts too.
        return result.value if isinstance(result, enum.Enum) else result
    last = value.value if isinstance(value, _Words) else value
    given = reprlib.repr(last)
    choices = _choices(key.kind)
    raise RecipeError(f"must be {describe(key.kind)}, given {given}{_did_you_mean(str(last), choices)}")


def _enums_only(kind: Any) -> Any:
    """``SomeEnum | str`` accepts any text, which fails later and worse; the enum alone accepts its own values."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = typing.get_args(kind)
        if any(isinstance(part, type) and issubclass(part, enum.Enum) for part in parts):
            return typing.Union[tuple(part for part in parts if part is not str)]  # noqa: UP007
    return kind


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(kind) for choice in _choices(part)]
    return []


def _takes_bool(kind: Any) -> bool:
    """Whether a bool is meant: pydantic also reads it as a number."""
    parts = typing.get_args(kind)
    return kind is bool or any(isinstance(part, bool) or _takes_bool(part) for part in parts)


def _takes_only_lists(kind: Any) -> bool:
    """Whether a list of texts is meant, and no text."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return list[str] in parts and str not in parts


def describe(kind: Any) -> str:
    """A type as a reader of YAML would put it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = [describe(part) for part in typing.get_args(kind)]
        return " or ".join(dict.fromkeys(sorted(parts, key=lambda part: part == "null")))
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if kind in names:
        return names[kind]
    origin = typing.get_origin(kind) or kind
    return {dict: "a mapping", list: "a list"}.get(origin, getattr(kind, "__name__", str(kind)))


def _nearest(key: str, keys: Iterable[str]) -> str:
    names = {name: name for name in keys}
    names |= {name: f"sparsity.estimator.{name}" for name in EstimatorConfig.model_fields if name not in names}
    names |= {name: f"sparsity.{name}" for name in SparsityConfig.model_fields if name not in names}
    names |= {f"sparsity.{name}": f"sparsity.{name}" for name in SparsityConfig.model_fields}
    if key in DEVICES:
        return "; use_cpu: true chooses the CPU, CUDA_VISIBLE_DEVICES=N in the environment a GPU"
    if key in names:
        return f"; did you mean {names[key]}?"
    if gone := removed.unknown(key):
        return f"; {gone}"
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else "; `sparse-unsloth keys` lists the valid ones"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as YAML can hold them."""
    return json.loads(json.dumps(values, default=str))
