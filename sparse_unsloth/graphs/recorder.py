"""Captures layers in CUDA graphs and replays them (docs/how-it-works.md, section 9.1).

A `LayerCapture` is one pass through one layer: its first forward under gradient checkpointing, its recompute with the
backward after it, or, without checkpointing, a forward that keeps its intermediates until its own backward
(`KeptCapture`). The first pass captures each of its calls; later passes copy their inputs to the captured addresses and
replay.

The graphs of passes that keep nothing share one memory pool. While a pass is captured, its intermediates are kept
alive, so that its calls do not overwrite each other. Afterwards they are released, and the next layer's capture uses
the same memory. Hence three rules. A pass is captured completely or not at all. Outputs of its calls are valid until
another pass begins (`LayerCapture.call` returns nothing if that is too early). Whoever needs them longer copies them.

The graphs of kept passes share a second pool, which no other graph writes to. There a forward's intermediates are alive
from its capture to the capture of its backward, so that nothing captured in between overwrites them, and nothing that
replays in between does if it was captured then. Hence three more rules. All kept passes of a batch signature are
captured in one forward and the backward after it (`KeptPasses`), or none is. A later forward replays any of them, in
the same order; where it needs another one, or one whose weights moved, that layer runs without capture, and the next
forward of the signature captures all of them anew. Batch signatures share the memory, so that no forward is captured or
replayed while the backward of another one may still come (`GraphCache.awaits_backward`).

Whatever cannot be captured or replayed runs without capture, with the same result: a pass whose capture fails, the
backward of a pass that was overwritten, and a second backward.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.graphs.buffers import Buffers
from sparse_unsloth.graphs.capture import GraphCapture
from sparse_unsloth.graphs.passes import CapturedForward, KeptCapture, KeptPasses, LayerCapture, Pass
from sparse_unsloth.model.training_flags import keeps_saved_tensors
from sparse_unsloth.utils.distributed import is_main
from sparse_unsloth.utils.progress import line

logger = logging.getLogger("sparse_unsloth")

RUNS_BEFORE_CAPTURE = 2
"""Forwards of one batch signature that run without capture first, so that every kernel is compiled."""
MAX_KEYS = 64
"""Batch signatures that are captured: each takes some tenths of a second, and memory for all layers' graphs."""
MAX_RECAPTURES = 4
"""Captures are given up when, on average, each was repeated so often because weights moved."""
MAX_COUNTED_KEYS = 256
"""Recent batch signatures whose forwards are counted."""
MAX_GIVEN_UP = 4
"""Once the captures of so many batch signatures failed, no further one is captured."""


class GraphCache(Buffers):
    """The CUDA graphs of an attached model.

    Args:
        recorder: captures functions; a `GraphCapture` by default.

    Attributes:
        captured_keys, prepared: batch signatures that are captured, and those that prepare for it.
        given_up: batch signatures that run without capture, because a capture failed.
        reserved: layers, with batch signatures, whose buffers for selections are reserved.
        serial, forward_number: count passes, and forwards whose layers are captured or replayed.
        kept_memory: bytes that the kept passes' pool held when they were last captured; other forwards cannot use them.
        kept_forms: by pass, what attention keeps for the recompute besides tensors (`ops.kept_attention`).
        captures_documents: whether attention within packed documents or a window is captured.
    """

    def __init__(self, recorder: Any = None):
        self.recorder = GraphCapture() if recorder is None else recorder
        self.serial = self.forward_number = 0
        self.captures_documents = True
        self._warned: set[str] = set()
        self._start()

    def __reduce__(self) -> tuple[Callable[..., GraphCache | None], tuple]:
        """Graphs belong to one model's memory: a copy starts without any, and is None where there is no GPU."""
        return _empty_cache, (type(self.recorder), self.captures_documents)

    def _start(self) -> None:
        self.drop_buffers()
        self.captured_keys: set[Hashable] = set()
        self.given_up: set[Hashable] = set()
        self._forward: weakref.ref[CapturedForward] | None = None
        self.prepared: set[Hashable] = set()
        self.reserved: set[Hashable] = set()
        self.kept_memory = 0
        self.kept_forms: dict[Hashable, Any] = {}
        self._began = self.serial
        self._moved = 0
        self._counted: OrderedDict[Hashable, int] = OrderedDict()
        self._captures: dict[Hashable, Pass] = {}
        self._kept: dict[Hashable, KeptPasses] = {}
        self._keeping: KeptPasses | None = None

    def clear(self) -> None:
        """Deletes all graphs and frees their memory."""
        self.recorder.forget()
        self.serial += 1  # passes that have begun are not intact any more
        self.forward_number += 1
        self._start()

    def give_up(self, batch_key: Hashable, error: Exception) -> None:
        """Deletes the graphs of a batch signature, whose capture failed; its layers run without capture from now on."""
        self.given_up.add(batch_key)
        self._captures = {key: known for key, known in self._captures.items() if key[1] != batch_key}
        if self._keeping is self._kept.pop(batch_key, None):
            self._keeping = None
        self._moved = 0
        if not self._kept:
            self.kept_memory = 0
        first = (str(error).strip().splitlines() or [""])[0]
        self._warn_once(
            "cuda_graphs: a capture failed, so micro-batches of its signature run without graphs, with the same "
            "result; those of others are still captured. If memory ran out, lower memory_budget or shorten "
            f"micro-batches. {type(error).__name__}: {first[:300]}",
            "a capture failed",
        )

    def should_replay(self, batch_key: Hashable) -> bool:
        """Whether the present forward, with the batch signature ``batch_key``, is captured or replayed.

        Call it once per forward: it counts the forwards of each batch signature (docs/how-it-works.md, section 9.2).
        """
        if batch_key in self.given_up:
            return False
        if batch_key in self.captured_keys:
            return True
        count = self._counted.pop(batch_key, 0)
        if count >= RUNS_BEFORE_CAPTURE and not self.full and len(self.given_up) < MAX_GIVEN_UP:
            self.captured_keys.add(batch_key)
            self._say()
            return True
        self._counted[batch_key] = count + 1
        if len(self._counted) > MAX_COUNTED_KEYS:
            self._counted.popitem(last=False)
        return False

    def captures_next(self, batch_key: Hashable) -> bool:
        """Whether the present forward, which is not captured, must prepare the capture of the next such one."""
        if batch_key not in self.prepared:
            if self._counted.get(batch_key, 0) < RUNS_BEFORE_CAPTURE or len(self.prepared) >= 2 * MAX_KEYS:
                return False
            self.prepared.add(batch_key)
        return True

    @property
    def full(self) -> bool:
        """Whether no further batch signatures are captured."""
        return len(self.captured_keys) >= MAX_KEYS

    @property
    def recaptures_too_often(self) -> bool:
        """Whether weights move so often that captures take more time than they save."""
        passes = len(self._captures) + sum(len(kept.passes) for kept in self._kept.values())
        return self._moved > MAX_RECAPTURES * passes

    def memory(self) -> int:
        """GPU memory of all graphs in bytes, without the buffers of their inputs."""
        return self.recorder.memory()

    def open(
        self, layer: int, batch_key: Hashable, which: Hashable, tensors: Sequence[Tensor], constants: tuple
    ) -> LayerCapture:
        """Begins a pass through a layer. Outputs of earlier passes become invalid.

        Args:
            which: identifies the pass among those of the layer with this batch signature.
            tensors: all weights that its calls read, at fixed addresses. If one moves, the pass is captured again.
            constants: other values that its calls depend on; if one changes, the pass is captured again.
        """
        self.serial += 1
        key, signature = (layer, batch_key, which), _signature(tensors, constants)
        known = self._captures.get(key)
        self._moved += known is not None and known[0] != signature
        if known is None or known[0] != signature or not all(call.complete for call in known[1].values()):
            known = signature, {}, {}
            if batch_key not in self.given_up:
                self._captures[key] = known
        return LayerCapture(self, layer, batch_key, *known[1:])

    def open_kept(
        self, layer: int, batch_key: Hashable, which: Hashable, tensors: Sequence[Tensor], constants: tuple
    ) -> KeptCapture | None:
        """Begins a forward of a layer whose intermediates are kept until its backward; arguments as in `open`.

        Returns:
            None where the layer must run without capture: in a replayed forward its pass is missing or its weights
            moved (`KeptPasses`), saved tensors are replaced (`keeps_saved_tensors`), or a capture failed.
        """
        if batch_key in self.given_up or not keeps_saved_tensors():
            return None
        signature = which, *_signature(tensors, constants)
        kept = self._keeping
        if kept is None:  # the first of this forward, so that nothing that was kept is needed
            kept = self._kept.get(batch_key)
            if kept is None or not kept.holds(layer, signature):
                self._moved += 0 if kept is None else len(kept.passes)
                kept = self._kept[batch_key] = KeptPasses(self._began)
            self._keeping = kept
        if kept.began == self._began:
            kept.passes[layer] = signature, {}, {}
            kept.unfinished += 1
        elif not kept.holds(layer, signature):
            kept.outdated = True
            return None
        self.serial += 1
        return KeptCapture(self, layer, batch_key, kept)

    @property
    def forward(self) -> CapturedForward | None:
        """The last forward whose layers were captured or replayed; None if its backward cannot come any more."""
        return None if self._forward is None else self._forward()

    @property
    def awaits_backward(self) -> bool:
        """Whether the last captured forward may still go backward, through what the next one would overwrite."""
        forward = self.forward
        return forward is not None and bool(forward.awaited)

    def begin_forward(self) -> CapturedForward:
        """Begins a forward of the model whose layers are captured or replayed; nothing may await backward."""
        before = self.forward
        if before is not None:
            before.overwritten = True
        forward = CapturedForward()
        self._forward, self._began = weakref.ref(forward), self.serial
        self.forward_number += 1
        kept, self._keeping = self._keeping, None
        if kept is not None and (kept.unfinished or kept.outdated):
            self._moved += len(kept.passes)
            self._kept = {key: one for key, one in self._kept.items() if one is not kept}
        return forward

    @property
    def unused(self) -> bool:
        """Whether no layer was captured or replayed since the last forward began."""
        return self.serial == self._began

    def _say(self) -> None:
        """Writes that a batch signature is captured: of the first, second, fourth, eighth, ..."""
        number = len(self.captured_keys)
        if number & (number - 1) == 0:
            line(
                f"sparse_unsloth: capturing CUDA graphs for batch signature {number} (at most {MAX_KEYS}); this step "
                "takes longer."
            )

    def _warn_once(self, message: str, about: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            if is_main():
                logger.warning(message)


_dtype = attrgetter("dtype")


def _signature(tensors: Sequence[Tensor], constants: tuple) -> tuple:
    return *constants, *map(Tensor.data_ptr, tensors), *map(_dtype, tensors)


def _empty_cache(recorder: type, captures_documents: bool) -> GraphCache | None:
    if recorder is GraphCapture and not torch.cuda.is_available():
        return None
    graphs = GraphCache(recorder())
    graphs.captures_documents = captures_documents
    return graphs
