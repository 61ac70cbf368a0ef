"""Evaluates MT-Bench: writes answers and model folders for FastChat, and tables by category from its judgements.

FastChat's judge calls a commercial model, so FastChat does the judging:

    sparse-unsloth evaluate RUN --suite mt-bench --questions question.jsonl      writes model_answer/RUN.jsonl
    cp .../model_answer/RUN.jsonl FASTCHAT/fastchat/llm_judge/data/mt_bench/model_answer/
    python gen_judgment.py --model-list RUN                                      in FASTCHAT/fastchat/llm_judge
    sparse-unsloth evaluate RUN --suite mt-bench --questions question.jsonl --judgements .../gpt-4_single.jsonl

With ``--export`` FastChat's ``gen_model_answer.py --model-path FOLDER`` can answer too, with its template.
"""

from __future__ import annotations

import secrets
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparse_unsloth.data.templates import adds_special_tokens, generation_prompt
from sparse_unsloth.evaluation.generation import generate
from sparse_unsloth.evaluation.model import EvaluationError, Source, load
from sparse_unsloth.evaluation.results import AnswerFile, read_lines, save_results

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""Temperatures by category, as in FastChat; 0.7 for others."""
WHERE = "it is in FastChat's repository, fastchat/llm_judge/data/mt_bench/question.jsonl, and in no package"
FAILED = -1
"""The score of an answer without a rating."""


def evaluate_mt_bench(
    source: Source,
    folder: Path,
    *,
    questions: str | None = None,
    judgements: str | None = None,
    export: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 1024,
) -> dict[str, Any]:
    """Answers the questions, exports the model and reads judgements, as requested.

    Args:
        source, folder: what to evaluate, and the folder of its files.
        questions: FastChat's ``question.jsonl``; needed for answers and for categories.
        judgements: FastChat's ``..._single.jsonl``.
        export: "adapter" or "merged": write a model folder that FastChat loads.
        limit: the number of questions, from the first.
        batch_size, max_new_tokens: of generation.

    Returns:
        See `save_results`; with judgements the mean score, and those of turns and categories. Items are a question's
        turns.

    Raises:
        EvaluationError: questions are missing, a file has another format, or the judgements do not name the run.
    """
    if export is not None:
        print(f"sparse-unsloth: FastChat loads {export_model(source, folder / 'model', export == 'merged')}")
    if questions is None:
        raise EvaluationError(f"mt-bench: give --questions FILE ({WHERE}).")
    asked = read_questions(questions)[:limit]
    name = source.folder.resolve().parent.name if source.recipe else source.name
    if judgements is None:
        path = answer(source, folder, asked, name, batch_size, max_new_tokens)
        print(f"sparse-unsloth: {path} is in FastChat's format; judge it there, then give --judgements.")
        return save_results(folder, "mt-bench", source.name, {}, answers=str(path))
    rows = [row for row in read_lines(judgements) if row.get("model") == name]
    if not rows:
        known = sorted({str(row.get("model")) for row in read_lines(judgements)})
        raise EvaluationError(f"{judgements}: judges no model {name!r}; it judges {', '.join(known) or 'none'}.")
    scores, items = score(rows, {row["question_id"]: row["category"] for row in asked})
    return save_results(folder, "mt-bench", source.name, scores, items, judged=len(items))


def read_questions(path: str) -> list[dict[str, Any]]:
    """Reads FastChat's questions.

    Raises:
        EvaluationError: there is no such file, or its lines have another format.
    """
    if not Path(path).is_file():
        raise EvaluationError(f"mt-bench: there is no file {path}; {WHERE}.")
    rows = list(read_lines(path))
    if not rows or any({"question_id", "category", "turns"} - row.keys() for row in rows):
        raise EvaluationError(f"{path}: is not FastChat's question file: question_id, category and turns are needed.")
    return rows


def answer(
    source: Source, folder: Path, questions: list[dict[str, Any]], name: str, batch_size: int, max_new_tokens: int
) -> Path:
    """Writes ``model_answer/<name>.jsonl``; answers of an interrupted evaluation are kept.

    All first turns are answered before the second turns, whose prompts contain the first answers.
    """
    settings = {"model": source.model, "adapter": source.adapter, "template": source.template}
    path = folder / "model_answer" / f"{name}.jsonl"
    answers = AnswerFile(path, "question_id", {**settings, "max_new_tokens": max_new_tokens})
    missing = [row for row in questions if row["question_id"] not in answers.rows]
    if not missing:
        return path
    model, tokenizer = load(source)
    by_temperature = defaultdict(list)
    for row in missing:
        by_temperature[TEMPERATURES.get(row["category"], 0.7)].append(row)
    for temperature, rows in by_temperature.items():
        given: list[list[str]] = [[] for _ in rows]
        for turn in range(max(len(row["turns"]) for row in rows)):
            chosen = [number for number, row in enumerate(rows) if turn < len(row["turns"])]
            prompts = []
            for number in chosen:
                turns = zip(rows[number]["turns"], [*given[number], None], strict=False)
                prompts.append(generation_prompt(source.template, tokenizer, list(turns), source.system_prompt))
            found: dict[int, str] = {}
            generate(
                model,
                tokenizer,
                prompts,
                found.__setitem__,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                add_special_tokens=adds_special_tokens(source.template),
                temperature=temperature,
                title=f"{source.name}: MT-Bench, turn {turn + 1}",
            )
            for place, number in enumerate(chosen):
                given[number].append(found[place].strip())
        for row, turns in zip(rows, given, strict=True):
            answers.add(
                {
                    "question_id": row["question_id"],
                    "answer_id": secrets.token_hex(11),
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
            )
    return path


def score(
    judgements: Iterable[Mapping[str, Any]], categories: Mapping[Any, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Averages scores overall, by turn and by category, as FastChat's ``show_result.py`` does; returns items too.

    Answers without a rating do not count. If a question was judged again, its last judgement counts.

    Args:
        judgements: of one model.
        categories: by question id.

    Raises:
        EvaluationError: a question has no category, or nothing was judged.
    """
    rated = {(row["question_id"], row["turn"]): float(row["score"]) for row in judgements}
    rated = {key: value for key, value in rated.items() if value != FAILED}
    unknown = [question for question, _ in rated if question not in categories]
    if unknown:
        raise EvaluationError(f"question {unknown[0]} is judged and not among the questions.")
    if not rated:
        raise EvaluationError("the judgements hold no rating.")
    groups = defaultdict(list)
    for (question, turn), value in rated.items():
        for group in ("score", f"turn {turn}", categories[question]):
            groups[group].append(value)
    turns = sorted(group for group in groups if group.startswith("turn "))
    order = ["score", *turns, *sorted(set(groups) - {"score", *turns})]
    items = {f"{question}/{turn}": value for (question, turn), value in sorted(rated.items())}
    return {group: statistics.fmean(groups[group]) for group in order}, items


def export_model(source: Source, folder: Path, merged: bool) -> Path:
    """Writes a folder for FastChat's ``--model-path``: the adapter, or base and adapter merged.

    Raises:
        EvaluationError: FastChat could not load the folder, or the base is in 4 bits and cannot be merged.
    """
    if source.adapter is None and not merged:
        raise EvaluationError(f"{source.name}: is no adapter; give its own folder to FastChat.")
    if not merged and "peft" in source.model:
        raise EvaluationError(
            f"FastChat refuses adapters whose base has 'peft' in its name ({source.model}); give --export merged."
        )
    if merged and source.recipe.get("load_in_4bit"):
        raise EvaluationError(
            f"{source.name}: was trained on a 4-bit base, and merging into that would round the adapter off; give "
            "--export adapter."
        )
    shutil.rmtree(folder, ignore_errors=True)
    if merged:
        model, tokenizer = load(source, sparse_prefill=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    shutil.copytree(source.adapter, folder)
    return folder
