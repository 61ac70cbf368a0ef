"""Runs one pass through a captured layer, and says where it must run without capture (see `graphs.recorder`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from sparse_unsloth.tokens.partition import TokenPartition

Call = Callable[..., "tuple[Sequence[Tensor], Any]"]


class CapturedForward:
    """A forward of the model whose layers are captured or replayed; whatever may run its backward references it.

    Attributes:
        awaited: the layers whose backward needs what the next captured forward overwrites: channel selections, or
            intermediates that a forward without checkpointing kept.
        overwritten: a later forward was captured or replayed, so that channel selections of this one may be gone.
    """

    def __init__(self) -> None:
        self.awaited: set[int] = set()
        self.overwritten = False


class LayerCapture:
    """One pass through one layer. The docstring of `graphs.recorder` says how long its outputs are valid.

    Args:
        graphs: the `GraphCache` that opened it.
        batch_key: the batch signature of its forward.

    Attributes:
        selections: the channel selections that its graphs made, by part; empty before.
    """

    def __init__(
        self,
        graphs: Any,
        layer: int,
        batch_key: Hashable,
        calls: dict[str, CapturedCall],
        selections: dict[str, Any],
    ):
        self.graphs, self.layer, self._calls, self.selections = graphs, layer, calls, selections
        self._batch_key, self._serial = batch_key, graphs.serial
        self._kept: KeptPasses | None = None

    def constant(self, name: str, values: Tensor) -> Tensor:
        """See `Buffers.constant`."""
        return self.graphs.constant(name, values)

    def reserved_buffer(self, name: str, like: Tensor) -> Tensor:
        """See `Buffers.reserved_buffer`."""
        return self.graphs.reserved_buffer(self.layer, name, like)

    def stage_input(self, name: str, values: Tensor) -> Tensor:
        """See `Buffers.stage_input`."""
        return self.graphs.stage_input(name, values)

    def static_partition(self, partition: TokenPartition) -> TokenPartition:
        """See `Buffers.static_partition`."""
        return self.graphs.static_partition(partition)

    def call(
        self, name: str, function: Call, inputs: Sequence[Tensor], after: str | None = None
    ) -> list[Tensor] | None:
        """The outputs of ``function(*inputs)``, captured or replayed.

        Args:
            name: identifies the call in the pass; the function always launches the same kernels.
            function: returns its outputs and a state for a later call of the same pass.
            inputs: the tensors that it reads and that are not at fixed addresses; they are copied to buffers.
            after: the call whose state ``function`` takes as its first argument.

        Returns:
            None where the layer must run without capture: what the pass computed before is overwritten, or capturing
            failed, now or before (`GraphCache.give_up`).
        """
        graphs = self.graphs
        if not self._is_intact() or self._batch_key in graphs.given_up:
            self._abandon()
            return None
        static = [graphs.stage_input((name, number), values) for number, values in enumerate(inputs)]
        call = self._calls.get(name)
        if call is not None:
            return call.replay(static)
        state = () if after is None else (self._calls[after],)
        try:
            call = CapturedCall(graphs.recorder, function, static, state, self._kept is not None)
        except RuntimeError as error:  # of a mistake in the function, too: run without capture, it is raised again
            graphs.give_up(self._batch_key, error)
            self._abandon()
            return None
        self._calls[name] = call
        return [output.detach() for output in call.first]

    def finish(self) -> None:
        """Ends the pass: its intermediates are no longer needed."""
        for call in self._calls.values():
            if not call.complete:
                call.release(self.graphs.recorder)

    def _is_intact(self) -> bool:
        """Whether nothing has overwritten what the pass computed."""
        return self.graphs.serial == self._serial

    def _abandon(self) -> None:
        """Forgets the pass if it is captured in part, so that it is captured anew."""
        if not all(call.complete for call in self._calls.values()):
            self._calls.clear()


class KeptPasses:
    """The captures of a batch signature's passes that keep their intermediates, all of one forward and its backward.

    Args:
        began: the pass after which that forward began (`GraphCache.serial`).

    Attributes:
        passes: by layer.
        unfinished: how many of them have no captured backward yet.
        outdated: a later forward needed another pass.
    """

    def __init__(self, began: int):
        self.began = began
        self.passes: dict[int, Pass] = {}
        self.unfinished = 0
        self.outdated = False

    def holds(self, layer: int, signature: tuple) -> bool:
        """Whether the pass of ``layer`` is among them, with these weights at these addresses."""
        return layer in self.passes and self.passes[layer][0] == signature


class KeptCapture(LayerCapture):
    """A forward through one layer that keeps its intermediates, and its backward after those of the layers after it.

    Outputs of its calls are valid until another pass begins; a forward's second one, the layer's input, until the
    layer's backward.
    """

    def __init__(self, graphs: Any, layer: int, batch_key: Hashable, kept: KeptPasses):
        super().__init__(graphs, layer, batch_key, *kept.passes[layer][1:])
        self._kept, self._forward_number = kept, graphs.forward_number
        self._ended = False

    def call(
        self, name: str, function: Call, inputs: Sequence[Tensor], after: str | None = None
    ) -> list[Tensor] | None:
        """See `LayerCapture.call`; None also in a second backward."""
        outputs = super().call(name, function, inputs, after)
        if outputs is not None:
            self._calls[name].first = []  # the caller copies them at once
        return outputs

    def finish(self) -> None:
        """Ends the pass after its backward."""
        captured = not self._ended and bool(self._calls) and not all(call.complete for call in self._calls.values())
        super().finish()
        self._ended = True
        self._kept.unfinished -= captured
        if captured and not self._kept.unfinished:
            self.graphs.kept_memory = self.graphs.recorder.memory(kept_alone=True)

    def _is_intact(self) -> bool:
        return not self._ended and self.graphs.forward_number == self._forward_number


class CapturedCall:
    """The CUDA graph of one call.

    Raises:
        RuntimeError: it cannot be captured; out of memory, say.
    """

    def __init__(
        self, recorder: Any, function: Call, inputs: Sequence[Tensor], earlier: tuple[CapturedCall, ...], kept: bool
    ):
        self.state: Any = None
        self.complete = False
        self._addresses = _addresses(inputs)

        def run() -> Sequence[Tensor]:
            outputs, self.state = function(*(call.state for call in earlier), *inputs)
            return outputs

        self.first, self._replay = recorder.capture(run, kept)

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs after a replay."""
        if _addresses(inputs) != self._addresses:
            raise AssertionError("the inputs are not at the captured addresses")
        return [output.detach() for output in self._replay()]

    def release(self, recorder: Any) -> None:
        """Releases the memory that only the capture needed."""
        self.first, self.state, self.complete = [], recorder.kept_state(self.state), True


Pass = tuple[tuple, dict[str, CapturedCall], dict[str, Any]]
"""What a captured pass depends on, its calls by name, and the channel selections that they make."""


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
