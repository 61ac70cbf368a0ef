"""Generates and tokenises the benchmark's tasks into one small file for the GPU machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_unsloth.data.generated import generate_questions
from sparse_unsloth.errors import SparsityError

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Task:
    """``parts``: reasoning-gym tasks with their options; ``steps``: whether answers are written out step by step."""

    title: str
    parts: dict[str, dict[str, Any]]
    system_prompt: str
    train_items: int
    test_items: int
    calibrated_on: str
    steps: bool = False


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
    ),
    "B": Task(
        "sums written out step by step",
        {"chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 2}},
        "Work it out step by step.",
        train_items=4800,
        test_items=500,
        calibrated_on="B",
        steps=True,
    ),
    "C": Task(
        "calibrated on A, trained to sort words",
        {"word_sorting": {"min_words": 3, "max_words": 6}},
        "Answer with the result only.",
        train_items=3200,
        test_items=500,
        calibrated_on="A",
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

    No training question is held out. ``shrink`` divides the numbers of items, for rehearsals.

    Returns:
        One line on each task.
    """
    arrays: dict[str, np.ndarray] = {}
    lines = {}
    for name, task in TASKS.items():
        parts = list(task.parts)
        train = [_questions(task, task.train_items // shrink, f"train {name} {seed}", set()) for seed in range(seeds)]
        seen = {row["question"] for rows in train for row in rows}
        test = _questions(task, task.test_items // shrink, f"test {name}", seen)
        for split, rows in [*((f"train{seed}", rows) for seed, rows in enumerate(train)), ("test", test)]:
            arrays |= _arrays(f"{name}/{split}", [_tokenise(tokenizer, task, row) for row in rows], rows, parts)
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
        flat, lengths, prompts, parts = (
            file[f"{task}/{split}/{what}"].astype(np.int64) for what in ("tokens", "lengths", "prompts", "parts")
        )
    tokens = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return Items(tokens, lengths, prompts, parts)


def _questions(task: Task, size: int, seed: str, seen: set[str]) -> list[dict[str, str]]:
    rows = generate_questions(list(task.parts), task.parts, size, seed, seen)
    if not task.steps:
        return rows
    for row in rows:
        row["answer"] = worked_steps(re.search(r": (.*) =$", row["question"])[1])
    return rows


def _tokenise(tokenizer: Any, task: Task, row: dict[str, str]) -> tuple[list[int], int]:
    """Tokenises prompt and answer with its end of turn; returns the tokens, and the number of prompt tokens."""
    messages = [{"role": "system", "content": task.system_prompt}, {"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, row["answer"] + END_OF_TURN)
    )
    return before + after, len(before)


def _arrays(key: str, tokenised: list[tuple[list[int], int]], rows: list[dict], parts: list[str]) -> dict:
    return {
        f"{key}/tokens": np.concatenate([np.array(tokens, dtype=np.uint16) for tokens, _ in tokenised]),
        f"{key}/lengths": np.array([len(tokens) for tokens, _ in tokenised], dtype=np.int32),
        f"{key}/prompts": np.array([prompt for _, prompt in tokenised], dtype=np.int32),
        f"{key}/parts": np.array([parts.index(row["task"]) for row in rows], dtype=np.int8),
    }
