"""Work beside other work: in a recording two branches of the graph, elsewhere one after the other.

Few dense rows keep a GPU waiting for weights, context rows keep it computing: together they take little longer than the
slower of them. Without a graph a second stream would cost more host time than it saves.
"""

from __future__ import annotations

import torch

_streams: dict[int, torch.cuda.Stream] = {}


class Beside:
    """A branch: ``with`` it goes what may run beside what follows, up to `join`.

    Where it runs on a stream of its own, what it allocates is that stream's. So nothing that it reads may be freed
    before `join`, and nothing that it made may be used before. It begins before what it runs beside: its later parts
    see no memory that the other branch gave back.
    """

    __slots__ = ("_entered", "_main", "_side", "_within")

    def __init__(self, device: torch.device):
        self._main, self._entered = None, False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._main = torch.cuda.current_stream(device)
            if device.index not in _streams:
                _streams[device.index] = torch.cuda.Stream(device)
            self._side = _streams[device.index]

    def __enter__(self) -> None:
        if self._main is not None:
            self._entered = True
            self._side.wait_stream(self._main)
            self._within = torch.cuda.stream(self._side)
            self._within.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._main is not None:
            self._within.__exit__(*error)

    def join(self) -> None:
        """What follows comes after both branches."""
        if self._entered:
            self._main.wait_stream(self._side)
