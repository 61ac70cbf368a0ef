"""Generates and tokenises the benchmark's tasks into one small file for the GPU machine."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.natural import Text, functions, passages, python_files
from sparse_unsloth.data.generated import generate_questions
from sparse_unsloth.errors import SparsityError

ENDS_OF_TURN = ("<|im_end|>", "<end_of_turn>")
"""Of SmolLM2 and of Gemma."""
LONGEST = 400
"""Tokens of a natural item."""
FIELDS = ("tokens", "lengths", "prompts", "parts")
"""The arrays of a task and split in the file of `prepare`."""


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Attributes:
        parts: reasoning-gym tasks with their options, or the kinds of natural items.
        steps, batch_size, rate: of a dense training, see `TrainingSettings`.
        worked: whether answers are written out step by step.
        natural: makes the items of natural text, from Python files; None for generated ones.
        context: least and greatest context share of a natural item.
    """

    title: str
    parts: dict[str, dict[str, Any]]
    system_prompt: str
    train_items: int
    test_items: int
    calibrated_on: str
    steps: int
    batch_size: int = 16
    rate: float = 1e-3
    worked: bool = False
    natural: Callable[[Iterable[tuple[str, str]]], list[Text]] | None = None
    context: tuple[float, float] = (0.0, 1.0)


TASKS = {
    "A": Task(
        "three tasks, long prompts, short answers",
        {
            "needle_haystack": {"min_num_statements": 6, "max_num_statements": 10},
            "word_sequence_reversal": {"min_words": 3, "max_words": 6},
            "family_relationships": {},
        },
        "Answer with the result only.",
        train_items=4800,
        test_items=1500,
        calibrated_on="A",
        steps=900,
    ),
    "B": Task(
        "sums written out step by step",
        {"chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 2}},
        "Work it out step by step.",
        train_items=4800,
        test_items=500,
        calibrated_on="B",
        steps=400,
        worked=True,
    ),
    "C": Task(
        "calibrated on A, trained to sort words",
        {"word_sorting": {"min_words": 3, "max_words": 6}},
        "Answer with the result only.",
        train_items=3200,
        test_items=500,
        calibrated_on="A",
        steps=300,
    ),
    "D": Task(
        "functions written from their docstrings",
        {"function": {}},
        "Write the body of the function.",
        train_items=3200,
        test_items=500,
        calibrated_on="D",
        steps=400,
        batch_size=8,
        rate=5e-4,
        natural=functions,
        context=(0.15, 0.35),
    ),
    "E": Task(
        "passages with questions about them",
        {"following": {}, "mentioning": {}},
        "Answer with a sentence of the text.",
        train_items=3200,
        test_items=500,
        calibrated_on="E",
        steps=400,
        batch_size=8,
        rate=5e-4,
        natural=passages,
        context=(0.7, 0.9),
    ),
}


@dataclass(frozen=True)
class Items:
    """Tokenised samples, as they are read from the file.

    Attributes:
        tokens: int64 ``[items, longest]``, zeros after the end.
        lengths: int64 ``[items]``, of prompt and answer together.
        prompts: int64 ``[items]``, of the prompt alone.
        parts: int64 ``[items]``: which of the task's parts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    parts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, count: int) -> Items:
        """Returns the first ``count`` items.

        Raises:
            SparsityError: there are fewer.
        """
        if count > len(self):
            raise SparsityError(
                f"{count} items were asked for, and the data hold {len(self)}. Prepare more, or ask less."
            )
        return Items(self.tokens[:count], self.lengths[:count], self.prompts[:count], self.parts[:count])


def task_of(label: str) -> str:
    """Returns the task of a row of results, whose column `task` may also name steps and a rate."""
    return label.split()[0]


def worked_steps(expression: str) -> str:
    """Solves a chain of sums and differences step by step: ``"42 - 25 - 73"`` becomes
    ``"42 - 25 = 17, 17 - 73 = -56. The answer is -56"``.
    """
    total, rest = re.fullmatch(r"\s*(-?\d+)(.*)", expression).groups()
    total, steps = int(total), []
    for sign, number in re.findall(r"([+-])\s*(-?\d+)", rest):
        after = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total} {sign} {number} = {after}")
        total = after
    return f"{', '.join(steps)}. The answer is {total}"


def prepare(path: Path, tokenizer: Any, seeds: int, shrink: int = 1) -> dict[str, str]:
    """Writes every task's training items of each seed, and the held-out items that all seeds share.

    No training question is held out. ``shrink`` divides the numbers of items, for rehearsals. Seeds draw their natural
    items from one pool.

    Returns:
        One line on each task.
    """
    arrays: dict[str, np.ndarray] = {}
    lines = {}
    for name, task in TASKS.items():
        parts, make = list(task.parts), _generated if task.natural is None else _natural
        for split, rows in make(tokenizer, name, task, seeds, shrink).items():
            arrays |= _arrays(f"{name}/{split}", rows, parts, len(tokenizer))
        lengths, prompts = (arrays[f"{name}/test/{what}"] for what in ("lengths", "prompts"))
        share = (prompts - 1).sum() / (lengths - 0).sum()
        lines[name] = f"{name}: {task.title}; {lengths.mean():.1f} tokens, context share {share:.1%}"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return lines


def read_items(path: Path, task: str, split: str) -> Items:
    """``split`` is "test" or "train0", "train1", ...

    Raises:
        SparsityError: no such file, task or split.
    """
    if not path.exists():
        raise SparsityError(f"{path} does not exist: run `python -m benchmarks.quality prepare --data {path}` first.")
    with np.load(path) as file:
        if f"{task}/{split}/lengths" not in file:
            raise SparsityError(f"{path} holds no {task}/{split}; it was prepared with fewer seeds, or other tasks.")
        return _items(*(file[f"{task}/{split}/{what}"] for what in FIELDS))


def _items(*arrays: np.ndarray) -> Items:
    """Returns the items of the arrays of `FIELDS`, whose tokens follow each other."""
    flat, lengths, prompts, parts = (array.astype(np.int64) for array in arrays)
    tokens = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return Items(tokens, lengths, prompts, parts)


def items_of(tokenizer: Any, name: str, task: Task, count: int, seed: int) -> Items:
    """Returns ``count`` training items of a task, without a file."""
    small = replace(task, train_items=count, test_items=0)
    make = _generated if task.natural is None else _natural
    arrays = _arrays("it", make(tokenizer, name, small, seed + 1, 1)[f"train{seed}"], list(task.parts), len(tokenizer))
    return _items(*(arrays[f"it/{what}"] for what in FIELDS))


def _generated(tokenizer: Any, name: str, task: Task, seeds: int, shrink: int) -> dict[str, list[Row]]:
    """Returns the tokenised items of reasoning-gym by split."""
    count = task.train_items // shrink
    splits = {f"train{seed}": _questions(task, count, f"train {name} {seed}", set()) for seed in range(seeds)}
    seen = {row["question"] for rows in splits.values() for row in rows}
    splits["test"] = _questions(task, task.test_items // shrink, f"test {name}", seen)
    return {split: [_tokenise(tokenizer, task, **row) for row in rows] for split, rows in splits.items()}


def _natural(tokenizer: Any, name: str, task: Task, seeds: int, shrink: int) -> dict[str, list[Row]]:
    """Returns the tokenised items of natural text by split, those of the lengths and context shares that `Task` asks.

    Raises:
        SparsityError: this installation has too few.
    """
    least, most = task.context
    pools: dict[bool, list[Row]] = {False: [], True: []}
    for text in task.natural(python_files()):
        row = _tokenise(tokenizer, task, text.question, text.answer, text.kind)
        if len(row.tokens) <= LONGEST and least <= (row.prompt - 1) / len(row.tokens) <= most:
            pools[text.held_out].append(row)
    wanted = {f"train{seed}": task.train_items // shrink for seed in range(seeds)} | {"test": task.test_items // shrink}
    splits = {}
    for split, count in wanted.items():
        pool = pools[split == "test"]
        if count > len(pool):
            raise SparsityError(f"task {name}: {count} items of {split} are wanted, and there are {len(pool)}.")
        splits[split] = random.Random(f"{split} {name}").sample(pool, count)
    return splits


def _questions(task: Task, size: int, seed: str, seen: set[str]) -> list[dict[str, str]]:
    rows = generate_questions(list(task.parts), task.parts, size, seed, seen)
    if not task.worked:
        return rows
    for row in rows:
        row["answer"] = worked_steps(re.search(r": (.*) =$", row["question"])[1])
    return rows


class Row(NamedTuple):
    """A tokenised item: prompt and answer, the number of prompt tokens, and the part of the task."""

    tokens: list[int]
    prompt: int
    part: str


def _tokenise(tokenizer: Any, definition: Task, question: str, answer: str, task: str) -> Row:
    """Tokenises prompt and answer with its end of turn; ``task`` is the part of the task."""
    messages = [{"role": "system", "content": definition.system_prompt}, {"role": "user", "content": question}]
    end = next(token for token in ENDS_OF_TURN if token in tokenizer.chat_template)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + end))
    return Row(before + after, len(before), task)


def _arrays(key: str, rows: list[Row], parts: list[str], vocabulary: int) -> dict:
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    return {
        f"{key}/tokens": np.concatenate([np.array(row.tokens, dtype=dtype) for row in rows]),
        f"{key}/lengths": np.array([len(row.tokens) for row in rows], dtype=np.int32),
        f"{key}/prompts": np.array([row.prompt for row in rows], dtype=np.int32),
        f"{key}/parts": np.array([parts.index(row.part) for row in rows], dtype=np.int8),
    }
