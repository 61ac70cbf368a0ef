"""Tests arms in separate processes: their rows, how they end, and their time limit."""

import os
import signal
import sys
import textwrap
import threading
import time

import pytest

from sparse_unsloth.bench import processes
from sparse_unsloth.bench.processes import MARK, STOPPED, Budget, Parent, Process, serve, warm_up


def child(code: str) -> list[str]:
    """A command that stands in for a bench's child."""
    return [sys.executable, "-c", f"import json, os, sys, time, signal\nMARK = {MARK!r}\n{textwrap.dedent(code)}"]


def test_a_childs_rows_are_taken_and_its_lines_passed_on(capsys, monkeypatch):
    code = """
        print("loading")
        sys.stderr.write("bar: 10%\\rbar: 50%")
        sys.stderr.flush()
        words = sys.argv[1:]
        report = {"table": "speed", "row": {"words": words, "env": os.environ["A"]}}
        print("\\n" + MARK + json.dumps(report), flush=True)
        print("done")
    """
    reports = []
    monkeypatch.setenv("UNSLOTH_GC_KEEP_LAYERS", "max")
    process = Process(("stock", "padded"), (), {"A": "1"})
    assert Parent().run(process, child(code), reports.append) is None
    words = ["--child", "--arms", "stock,padded", "--methods", ""]
    assert reports == [{"table": "speed", "row": {"words": words, "env": "1"}}]
    printed = capsys.readouterr().out
    assert "loading" in printed
    assert "bar: 50%" in printed
    assert "bar: 10%" not in printed
    assert "done" in printed
    assert MARK not in printed
    assert "without UNSLOTH_GC_KEEP_LAYERS: arms are Unsloth's defaults" in printed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(MARK + json.dumps({'failed': 'RuntimeError: no memory'})); sys.exit(1)", "RuntimeError: no memory"),
        (
            "print('Fatal: bad driver', flush=True); os._exit(3)",
            "the process ended with exit code 3: Fatal: bad driver",
        ),
        ("import nowhere", "the process ended with exit code 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process ended with exit code -9: "),
        ("pass", None),
    ],
)
def test_why_a_child_failed(code, error):
    parent = Parent()
    assert parent.run(Process(("stock",)), child(code), print) == error
    assert parent.stopped is None


def test_a_child_reports_what_its_work_raises(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:

        def work():
            raise RuntimeError("out of luck\nsecond line")

        assert serve(work) == 1
        assert serve(lambda: None) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    assert printed.out == f'\n{MARK}{{"failed": "RuntimeError: out of luck"}}\n'
    assert "second line" in printed.err


SLOW = """
    def leave(*_):
        print(MARK + json.dumps({"row": "the last one"}), flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, leave)
    print(MARK + json.dumps({"row": "first"}), flush=True)
    time.sleep(60)
"""


def test_the_time_ends_a_child_which_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(processes, "LOADING", 0.1)
    parent, rows = Parent(seconds=processes.GRACE + 1.5), []
    began = time.time()
    assert parent.run(Process(("stock",)), child(SLOW), rows.append) is None
    assert time.time() - began < 20
    assert (parent.stopped, rows) == ("the time is up", [{"row": "first"}, {"row": "the last one"}])
    assert parent.run(Process(("padded",)), ["no such command"], rows.append) is None
    short = Parent(seconds=processes.GRACE + 0.05)
    assert short.run(Process(("padded",)), ["no such command"], rows.append) is None
    assert short.stopped == "the time is up"


def test_a_stopped_job_stops_its_child():
    rows = []

    def take(report):
        rows.append(report)
        if len(rows) == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    with Parent().listening() as parent:
        assert parent.run(Process(("stock",)), child(SLOW), take) is None
    assert signal.getsignal(signal.SIGTERM) == before
    assert parent.stopped == "told to stop"
    assert rows == [{"row": "first"}, {"row": "the last one"}]


def test_a_child_begins_nothing_that_ends_too_late(capsys):
    budget = Budget(time.time() + 100)
    with budget.piece():
        pass
    budget._last = 200.0
    with pytest.raises(SystemExit) as caught, budget.piece():
        raise AssertionError("begun")
    assert caught.value.code == STOPPED
    assert "the next piece takes some 200 s" in capsys.readouterr().out
    with Budget(None).piece():
        pass


def test_warming_up_ends_when_steps_are_steady():
    times = iter([90.0, 30.0, 10.0, 11.0, 10.0])
    assert warm_up(lambda: next(times), least=2) == [90.0, 30.0]  # a second step that is quicker than all before
    times = iter([10.0, 90.0, 30.0, 11.0, 10.0])
    assert warm_up(lambda: next(times), least=2) == [10.0, 90.0, 30.0, 11.0]
    times = iter(range(1, 100))
    assert len(warm_up(lambda: next(times), least=1, most=5)) == 1
    times = iter([1.0, *[2.0] * 20])
    assert len(warm_up(lambda: next(times), least=2, most=5)) == 5
