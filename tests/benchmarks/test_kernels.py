"""Tests the kernels' benchmark, every kernel in guarded memory, and that its checks find planted faults."""

import csv
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def modules():
    """kernel_cases, kernel_checks, the benchmark, the sanitizer's script and the planted overrun."""
    suite = "benchmarks.kernel_suite."
    names = {f"kernel_{name}": suite + name for name in ("cases", "checks", "inputs")}
    names["kernels"] = suite + "__main__"
    folder = str(ROOT / "tests" / "gpu")
    sys.path.insert(0, folder)
    try:
        names |= {"sanitize": "sanitize", "overrun": "overrun"}
        return {name: importlib.import_module(module) for name, module in names.items()}
    finally:
        sys.path.remove(folder)


def test_the_rehearsal_runs_every_kernel(modules, tmp_path, monkeypatch):
    launched = set()
    for file in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"sparse_unsloth.kernels.{file.stem}")
        if file.stem != "launch" and hasattr(module, "launch"):

            def spy(kernel, *rest, launch=module.launch, **options):
                launched.add(kernel.__name__)
                launch(kernel, *rest, **options)

            monkeypatch.setattr(module, "launch", spy)
    assert modules["kernels"].main(["--tiny", "--out", str(tmp_path), "--seed", "5"]) == 0
    sources = "\n".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    assert launched == set(re.findall(r"launch\((\w+_kernel),", sources))
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"5"}
    assert all(float(row["ms"]) > 0 and float(row["floor_ms"]) > 0 and float(row["error"]) < 2e-5 for row in rows)
    text = (tmp_path / "kernels.txt").read_text()
    assert all(row["kernel"] in text and row["shape"] in text for row in rows)


def test_a_wrong_kernel_is_not_timed(modules, tmp_path, monkeypatch, capsys):
    from sparse_unsloth.kernels import gated

    true = gated.gated_forward
    monkeypatch.setattr(gated, "gated_forward", lambda *inputs: true(*inputs).mul_(1.001))
    assert modules["kernels"].main(["--tiny", "--only", "gated", "--out", str(tmp_path)]) == 1
    assert "STOPPED: gated_forward silu" in capsys.readouterr().out
    assert (tmp_path / "kernels.csv").read_text().count("\n") == 1  # the heading alone


def test_time_is_bounded_and_said(modules, capsys):
    assert modules["kernels"].main(["--tiny", "--only", "gated", "--seconds", "0"]) == 1
    assert "12 cases were not run, the time was up: gated_forward silu" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_benchmark_needs_a_gpu(modules, capsys):
    with pytest.raises(SystemExit):
        modules["kernels"].main([])
    assert "there is no CUDA GPU here" in capsys.readouterr().err


def test_every_kernel_stays_within_its_memory(modules):
    cases, checks, sizes = (modules[f"kernel_{name}"] for name in ("cases", "checks", "inputs"))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in cases.cases(sizes.ODD, sizes.Draw("cpu", dtype, seed=3)):
        memory = checks.Guard()
        inputs = checks.change_tensors(case.inputs, lambda tensor, hold=memory.hold: hold(tensor, device))
        checks.check(case, inputs, memory)


def case_of(checks, ours, reference=lambda x: x + 1):
    return checks.Case("planted", "7", (torch.zeros(7),), ours, reference, 1.0)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (lambda x, run: run(x.new_empty(7)), r"1 elements beside tensor \d, \(7,\) torch.float32 were written"),
        (lambda x, run: torch.empty_like(x), "relative error of nan"),
        (lambda x, run: x.add_(1), "input 0 was written"),
        (lambda x, run: x + 1.001, "relative error of 0.001, more than 2e-05"),
        (lambda x, run: (x + 1)[:3], r"is \(3,\), not \(7,\)"),
        (lambda x, run: x.as_strided((7,), (1,), x.storage_offset() + 1) + 1, "relative error of nan"),
    ],
)
def test_faults_are_found(modules, ours, message):
    checks = modules["kernel_checks"]
    run = modules["overrun"].overrun
    reference = (lambda x: torch.arange(7.0)) if "elements" in message else (lambda x: x + 1)
    case = case_of(checks, lambda x: ours(x, run), reference)
    memory = checks.Guard()
    inputs = checks.change_tensors(case.inputs, lambda tensor: memory.hold(tensor, "cpu"))
    with pytest.raises(checks.WrongOutput, match=message):
        checks.check(case, inputs, memory)


def test_integers_must_be_equal(modules):
    checks = modules["kernel_checks"]
    case = case_of(checks, lambda x: torch.tensor([1, 2, 4]), lambda x: torch.tensor([1, 2, 3]))
    with pytest.raises(checks.WrongOutput, match="differs in 1 of 3 places"):
        checks.check(case)


FAKE_TOOL = """#!/bin/sh
case "$*" in *planted*) echo "========= Invalid __global__ write of size 4 bytes";; esac
case "$*" in *racecheck*) echo "========= Device not supported"; exit 3;; esac
case "$*" in *initcheck*) echo "========= Uninitialized __global__ memory read"; exit 9;; esac
"""


def test_the_tools_are_run_and_judged(modules, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_TOOL)
    tool.chmod(0o755)
    sanitize = modules["sanitize"]
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize.sys, "executable", "/bin/true")  # the guarded run: see the test above
    words = ["--out", str(tmp_path / "logs"), "--seconds", "1"]
    assert sanitize.main(words) == sanitize.FAULT
    printed = capsys.readouterr().out
    for line in ("guarded: clean", "memcheck: clean", "initcheck: FAULT", "racecheck: INCOMPLETE", "planted: found"):
        assert line in printed
    assert "--tool memcheck --error-exitcode 9" in (tmp_path / "logs" / "sanitize-memcheck.txt").read_text()
    tool.write_text(FAKE_TOOL.replace("exit 9", "exit 0"))
    assert sanitize.main(words) == sanitize.INCOMPLETE
    tool.write_text("#!/bin/sh\n")
    assert sanitize.main(words) == sanitize.FAULT  # a tool that does not find the planted fault
    assert "planted: NOT FOUND" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main(words) == sanitize.INCOMPLETE
