"""Evaluates commonsense and arithmetic tasks with lm-eval: its tasks, or the published protocol on local test files.

The published protocol uses the prompts of training and greedy answers, and compares the last number, or the first
option, in an answer. Test files hold ``instruction`` and ``answer``, as in
https://github.com/AGI-Edgerunners/LLM-Adapters (dataset/<task>/test.json). lm-eval's tasks of the same names have other
prompts and score options by their likelihood: they compare with other publications, not with the paper.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_unsloth.data.templates import adds_special_tokens, generation_prompt
from sparse_unsloth.evaluation.model import EvaluationError, Source, load
from sparse_unsloth.evaluation.results import save_results
from sparse_unsloth.utils.unreadable import text_of

TASKS = {
    "commonsense": (
        "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
    "arithmetic": ("gsm8k",),
}  # fmt: skip
"""lm-eval's tasks by suite. SVAMP and MAWPS are not among them: give their files by ``--data``."""
OPTION = r"(?i)(true|false|(?:answer|solution|option|ending)\s?[1-5])"
NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
PREFERRED = ("exact_match", "acc_norm", "acc")
"""The metric of a task that its suite is averaged over, by lm-eval's names."""


def evaluate_harness(
    source: Source,
    folder: Path,
    suite: str,
    *,
    data: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """Runs the suite's tasks through ``lm_eval.simple_evaluate``.

    Args:
        source, folder: what to evaluate, and where results go.
        suite: "commonsense" or "arithmetic".
        data: ``name=file`` pairs: the published protocol on local files, instead of lm-eval's own tasks.
        tasks: names of lm-eval tasks, instead of the suite's.
        shots: examples before a question of lm-eval's own tasks.
        limit: the number of questions of each task, from the first.
        batch_size: questions per batch.
        max_new_tokens: the longest answer under the published protocol.

    Returns:
        See `save_results`: the mean over the tasks first, then each task; items are single questions.

    Raises:
        EvaluationError: lm-eval is missing or cannot load a task, or a file has another format.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"commonsense and arithmetic tasks need lm-eval ({error}): `pip install 'sparse-unsloth[eval]'` or `pip "
            "install 'lm-eval[hf]'`."
        ) from error
    files = dict(_pair(word) for word in data or ())
    if files and tasks:
        raise EvaluationError("--data and --tasks: give one of them.")
    for file in files.values():
        _check_file(file)
    model, tokenizer = load(source)
    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size}
    if files:
        chosen = []
        for name, file in files.items():
            asked = write_prompts(source, tokenizer, file, folder / f"{name}-prompts.jsonl")
            chosen.append(published_task(name, asked, suite, max_new_tokens))
        # As in training, the tokenizer adds the beginning of sequence to the Alpaca form.
        options["add_bos_token"] = adds_special_tokens(source.template)
    else:
        chosen = list(tasks or TASKS[suite])
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(**options),
            tasks=chosen,
            task_manager=TaskManager(include_defaults=not files),
            num_fewshot=None if files else shots,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError, KeyError, ValueError) as error:
        raise EvaluationError(
            f"lm-eval cannot run {', '.join(files or chosen)}: {str(error).strip() or type(error).__name__}. Its own "
            "tasks read their data from the Hugging Face hub; local files are given by --data NAME=FILE."
        ) from error
    scores, items = collect(found)
    how = {"lm_eval": importlib.metadata.version("lm-eval"), "protocol": "published" if files else "lm-eval's own"}
    return save_results(folder, suite, source.name, scores, items, **how)


def published_task(name: str, prompts: Path, suite: str, max_new_tokens: int) -> dict[str, Any]:
    """Makes an lm-eval task with greedy answers, in which the first `OPTION` or the last `NUMBER` is compared.

    Args:
        name: of the task.
        prompts: a file of ``prompt`` and ``answer``, see `write_prompts`.
        suite: "commonsense" or "arithmetic".
        max_new_tokens: longest answer.
    """
    numbers = suite == "arithmetic"
    pattern = {"regex_pattern": NUMBER if numbers else OPTION, "group_select": -1 if numbers else 0}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(prompts)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["### Instruction:"], "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", **pattern}, {"function": "take_first"}]},
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",(?=\\d)", "\\.0+$", "\\s"],
            }
        ],
        "metadata": {"version": 1},
    }


def write_prompts(source: Source, tokenizer: Any, file: str, target: Path) -> Path:
    """Writes the questions of ``file`` with the prompts of training, and their answers, for lm-eval."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as lines:
        for row in _rows(file):
            text = row["instruction"] if not row.get("input") else f"{row['instruction']}\n\n{row['input']}"
            prompt = generation_prompt(source.template, tokenizer, [(text, None)], source.system_prompt)
            lines.write(json.dumps({"prompt": prompt, "answer": _plain(row["answer"])}) + "\n")
    return target


def collect(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Collects ``(scores, items)`` from a result of ``simple_evaluate``: mean over tasks, each task, each question.

    Raises:
        EvaluationError: a task has none of the metrics in `PREFERRED`.
    """
    scores, items = {}, {}
    for task, metrics in found["results"].items():
        names = [name for name in metrics if name.partition(",")[0] in PREFERRED]
        if not names:
            raise EvaluationError(f"lm-eval gave {task} no metric of {', '.join(PREFERRED)}: {', '.join(metrics)}.")
        # One filter's figure of the preferred metric; lm-eval lists the strictest filter first.
        chosen = min(names, key=lambda name: PREFERRED.index(name.partition(",")[0]))
        scores[task] = float(metrics[chosen])
        metric, _, used = chosen.partition(",")
        for sample in found.get("samples", {}).get(task, ()):
            if sample.get("filter", used) == used and metric in sample:
                items[f"{task}/{sample['doc_id']}"] = float(sample[metric])
    return {"mean": sum(scores.values()) / len(scores), **scores}, items


def _pair(word: str) -> tuple[str, str]:
    name, equals, file = word.partition("=")
    if not (name and equals and file):
        raise EvaluationError(f"--data: write NAME=FILE, given {word!r}.")
    return name, file


def _rows(file: str) -> list[dict[str, Any]]:
    """Reads the rows of a JSON list, or of JSON lines."""
    path = Path(file)
    if not path.is_file():
        raise EvaluationError(f"--data: there is no file {file}.")
    text = text_of(path, EvaluationError, f"--data: {file}")
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line]
        )
    except ValueError as error:
        raise EvaluationError(f"--data: {file} is no JSON: {error}") from None
    return rows


def _check_file(file: str) -> None:
    rows = _rows(file)
    missing = [name for name in ("instruction", "answer") if not rows or name not in rows[0]]
    if missing:
        columns = ", ".join(rows[0]) if rows else "none, it is empty"
        raise EvaluationError(f"--data: {file} has no {' and no '.join(missing)} (its columns: {columns}).")


def _plain(answer: Any) -> str:
    """Removes a zero fraction: test files write 18 as 18.0."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
