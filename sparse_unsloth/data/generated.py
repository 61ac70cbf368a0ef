"""Generates verifiable questions and answers with reasoning-gym."""

from __future__ import annotations

import difflib
import random
from dataclasses import fields
from typing import TYPE_CHECKING

from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

REASONING_GYM = "reasoning-gym:"


def reasoning_gym_splits(arguments: DataArguments, evaluation: bool) -> tuple[Dataset, Dataset | None]:
    """Generates training and held-out samples from separate seeds; no question occurs in both."""
    from datasets import Dataset

    tasks = [task.strip() for task in arguments.dataset_name.removeprefix(REASONING_GYM).split(",") if task.strip()]
    options = dict(arguments.dataset_options or {})
    unknown = sorted(set(options) - set(tasks))
    if not tasks or unknown:
        problem = f"dataset_options: {', '.join(unknown)} not among the tasks" if unknown else "no task is named"
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
    """Generates ``size`` shuffled samples, in equal parts of each task, without the questions in ``seen``."""
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
    except ImportError as error:
        raise DataError(
            f"reasoning-gym is not installed ({error}): `pip install 'sparse-unsloth[quickstart]'` or `pip install "
            "reasoning-gym`."
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
