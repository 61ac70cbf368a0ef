"""Trains two models in turns, so that the times of their steps can be compared in pairs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transformers import TrainerCallback


class _Ended(BaseException):
    """Ends a function whose partner failed."""


class Turns:
    """Runs two functions in threads of which one at a time goes on: A, B, B, A, A, B, B, ...

    Turns ``2 k`` and ``2 k + 1`` are a pair: right after each other, so that what else the machine does slows down both
    alike, and neither function is the first of more pairs than the other.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._over: set[int] = set()
        self._error: BaseException | None = None

    def run(self, first: Callable[[Callable[[], None]], None], second: Callable[[Callable[[], None]], None]) -> None:
        """Runs both functions to their end.

        Args:
            first: has the first turn, in this thread; gets a function that gives the turn away and returns at its next.
            second: likewise, in a thread of its own.

        Raises:
            BaseException: what one of them raised; the other is ended where it gives its turn away.
        """
        thread = threading.Thread(target=self._take_part, args=(1, second), name="second of two trainings")
        thread.start()
        self._take_part(0, first)
        thread.join()
        if self._error is not None:
            raise self._error

    def _take_part(self, number: int, function: Callable[[Callable[[], None]], None]) -> None:
        try:
            self._await(number)
            function(lambda: self._give_away(number))
        except _Ended:
            pass
        except BaseException as error:
            self._error = self._error or error
        with self._condition:
            self._over.add(number)
            self._turn += 1
            self._condition.notify_all()

    def _give_away(self, number: int) -> None:
        with self._condition:
            self._turn += 1
            self._condition.notify_all()
        self._await(number)

    def _await(self, number: int) -> None:
        def is_mine() -> bool:
            return self._error is not None or 1 - number in self._over or (self._turn + 1) // 2 % 2 == number

        with self._condition:
            self._condition.wait_for(is_mine)
        if self._error is not None:
            raise _Ended


class StepInTurns(TrainerCallback):
    """Gives the turn away before each step but the first; to be called before what times the step."""

    def __init__(self, give_away: Callable[[], None]):
        self._give_away = give_away

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._give_away()
