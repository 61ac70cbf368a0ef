"""Runs each arm, and our methods together, in a separate process, which reports its rows to the parent.

The parent never uses the GPU. A child prints its rows as JSON after a mark; the parent passes on all other lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from sparse_unsloth.bench.arms import arm_of, conflicts_with_arms
from sparse_unsloth.bench.methods import backend_of

MARK = "@bench "
STOPPED = 143
"""Exit code of a child that was stopped by a signal or the time limit."""
GRACE = 30
"""Seconds in which a stopped child must write its measurements."""
LOADING = 60
"""No child starts with fewer seconds left: it could hardly load the model."""
STEADY = 1.15
"""A step, or a pass, this much slower than the quickest so far is still warming up."""


@dataclass(frozen=True)
class Process:
    """The work of one process: arms that can share it, or our methods of one backend."""

    arms: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Returns the words of the child's command line after the parent's."""
        return ["--child", "--arms", ",".join(self.arms), "--methods", ",".join(self.methods)]

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """Returns the child's environment: ours, for arms without conflicting variables."""
        return {name: text for name, text in ours.items() if name not in self.conflicting_variables(ours)} | dict(
            self.env
        )

    def conflicting_variables(self, ours: Mapping[str, str]) -> list[str]:
        """Returns the variables that are removed for arms."""
        return [name for name in ours if self.arms and conflicts_with_arms(name)]


def processes_of(arms: Sequence[str], methods: Sequence[str]) -> list[Process]:
    """Orders the processes: the first arm, ours, the other arms, so that the main comparison is complete first.

    Arms share a process if they differ in their layout alone.
    """
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name in arms:
        arm = arm_of(name)
        env, lora = (tuple(sorted(given.items())) for given in (arm.env, arm.lora))
        alike[arm.backend, arm.liger, env, lora].append(name)
    of_arms = [Process(tuple(names), (), dict(env)) for (_, _, env, _), names in alike.items()]
    by_backend = [tuple(name for name in methods if backend_of(name) == backend) for backend in ("unsloth", "peft")]
    ours = [Process((), chosen) for chosen in by_backend if chosen]
    return [*of_arms[:1], *ours, *of_arms[1:]]


class Parent:
    """Runs children in turn until the time is up or the job is told to stop.

    Args:
        seconds: the time limit of all children; None: no limit.

    Attributes:
        stopped: why no further child is started; None while there is no reason.
    """

    def __init__(self, seconds: float | None = None):
        self.deadline = None if seconds is None else time.time() + seconds - GRACE
        self.stopped: str | None = None
        self._child: subprocess.Popen | None = None
        self._environment = dict(os.environ)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Parent]:
        """Inside, SIGTERM stops the child, which writes its rows, and then this process."""
        before = signal.signal(signal.SIGTERM, lambda *_: self._stop("told to stop"))
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def run(self, process: Process, command: Sequence[str], take: Callable[[dict], None]) -> str | None:
        """Runs one child, and passes its reports on while it runs.

        Args:
            command: of the child, without the words of ``process``.
            take: called with each report of a row.

        Returns:
            The first line of the error that ended it; None if it succeeded or was stopped, see ``stopped``.
        """
        left = None if self.deadline is None else self.deadline - time.time()
        if left is not None and left < LOADING:
            self.stopped = self.stopped or "the time is up"
        if self.stopped:
            return None
        words = [*command, *process.words()]
        if self.deadline is not None:
            words += ["--deadline", str(self.deadline)]
        if taken := process.conflicting_variables(self._environment):
            print(f"without {', '.join(taken)}: arms are Unsloth's defaults", flush=True)
        error, last = None, ""
        self._child = subprocess.Popen(
            words, env=process.environment(self._environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        timers = []
        if left is not None:
            timers = [
                threading.Timer(left, partial(self._stop, "the time is up")),
                threading.Timer(left + GRACE, self._child.kill),
            ]
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            for raw in self._child.stdout:
                # The last state of a progress bar, which overwrites its line.
                line = raw.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
                if not line.startswith(MARK):
                    if line.strip():
                        print(line, flush=True)
                        last = line.strip()
                    continue
                report = json.loads(line[len(MARK) :])
                error = report.get("failed", error)
                if "row" in report:
                    take(report)
            code = self._child.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if self._child.poll() is None:
                self._child.terminate()
                self._child.wait(GRACE)
        if code == STOPPED or self.stopped:
            self.stopped = self.stopped or "the time is up"
            return None
        if code and error is None:
            error = f"the process ended with exit code {code}: {last}"
        return error

    def _stop(self, why: str) -> None:
        self.stopped = why
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()


def own_command(words: Sequence[str]) -> list[str]:
    """Returns the command that runs ``sparse-unsloth`` with these words, by the same interpreter."""
    return [sys.executable, "-m", "sparse_unsloth.cli", *words]


# -- The child's side -------------------------------------------------------------------------------------------------


def emit(**report: object) -> None:
    """Reports to the parent: ``row=`` a row of its ``table=``, or ``failed=`` why all remaining work fails."""
    # A progress bar may have left the line open.
    print("\n" + MARK + json.dumps(report), flush=True)


def serve(work: Callable[[], None]) -> int:
    """Runs the child's work and returns its exit code; exceptions are reported to the parent."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        emit(failed=first_line(error))
        return 1
    return 0


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the writing
    sys.exit(STOPPED)


class Budget:
    """Stops a child before a piece of work that would not end by the deadline."""

    def __init__(self, deadline: float | None):
        self.deadline, self._last = deadline, 0.0

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Raises SystemExit if a piece as long as the one before would end too late."""
        began = time.time()
        if self.deadline is not None and began + self._last > self.deadline:
            print(f"the time is up: the next piece takes some {self._last:.0f} s", flush=True)
            sys.exit(STOPPED)
        yield
        self._last = time.time() - began


def first_line(error: BaseException) -> str:
    """Returns the error's type and first line, for a table's note."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def warm_up(step: Callable[[], float], least: int, most: int = 12) -> list[float]:
    """Runs steps until one is about as quick as the quickest, when compiling and capturing are over; returns times.

    Args:
        step: runs one step, and returns its time.
    """
    times: list[float] = []
    while len(times) < least or (times[-1] > STEADY * min(times) and len(times) < most):
        times.append(step())
    return times
