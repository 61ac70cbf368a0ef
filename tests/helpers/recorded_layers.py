"""Whole layers that are recorded by a stand-in, which runs their functions again."""

import gc
import itertools
import weakref

import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.graphs import buckets, passes
from sparse_unsloth.graphs import recorder as graphs
from sparse_unsloth.graphs.recorder import GraphCache

from masked_models import every_step
from tiny_models import always, loss_and_gradients
from whole_layers import make_model, small_batch

LAYERS = 2
CPU = torch.device("cpu")


RULES = {
    "both": {"mlp": {"0-1": 0.6}, "self_attn": {"1": 0.5}},
    "attention alone": {"mlp": {}, "self_attn": {"0": 0.5}},
    "no dense rows": {"mlp": {"1": 0.6}, "self_attn": {"1": 0.5}, "dense_tokens": "none"},
    "nothing dropped": {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}},
    "dense": {"mlp": {}, "self_attn": {}},
    "MLP alone": {"mlp": {"all": 0.6}, "self_attn": {}},
}


class Pool:
    """The memory that kept passes share, in blocks: what a graph writes to one overwrites what lay there."""

    def __init__(self):
        self.taken = set()
        self.contents = {}
        self.outside = set()

    def allocate(self):
        """The first free block, as what was released is used again at once."""
        block = next(number for number in itertools.count() if number not in self.taken)
        self.taken.add(block)
        return block

    def write(self, block, tensors):
        for tensor in self.contents.get(block, ()):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in self.outside:
                tensor.data.fill_(torch.nan)
        self.contents[block] = tensors


class Rerun:
    """Runs a recorded function again, and writes what it returns to where the first outputs lay.

    A call of a kept pass takes two blocks of a `Pool` when it is recorded: for what autograd saves in it, until the
    pass is released or forgotten, and for all else, until the recording ends. It writes to both in each replay.
    """

    def __init__(self):
        self.recorded = 0
        self.replayed = 0
        self.places = []
        self.within_pass = set()
        self.within_forward = set()
        self.pool = Pool()
        self.blocks = weakref.WeakKeyDictionary()

    def note(self, what, kept):
        """A pass that is replayed in part does not hold what recording the rest would have to leave alone.

        Neither do the kept passes of a forward.
        """
        noted = self.within_forward if kept else self.within_pass
        noted.add(what)
        assert len(noted) == 1

    def capture(self, function, kept=False):
        self.recorded += 1
        self.note("recorded", kept)
        if kept:
            gc.collect()  # of passes that were forgotten: CUDA graphs hold no reference to themselves
        blocks = [self.pool.allocate() for _ in range(2 * kept)]

        def run():
            if not kept:
                return function()
            saved = []

            def pack(tensor):
                saved.append(tensor.detach())
                return saved[-1]

            for block in blocks:
                self.pool.write(block, ())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = function()
            self.pool.write(blocks[0], [*saved, *lasting])
            return outputs

        lasting = []
        found = run()
        saved = {one.untyped_storage().data_ptr() for one in (self.pool.contents[blocks[0]] if kept else ())}
        first = [output.clone() for output in found]
        places = [output.clone() for output in first]
        for output, *copies in zip(found, first, places, strict=True):
            if output.untyped_storage().data_ptr() in saved:  # it is there until backward
                lasting += copies
            else:
                self.places.append(copies[1])
        if kept:
            self.pool.contents[blocks[0]] += lasting

        def again():
            self.replayed += 1
            self.note("replayed", kept)
            for place, output in zip(places, run(), strict=True):
                place.copy_(output)
            return places

        if kept:
            self.pool.taken.remove(blocks[1])
            self.blocks[again] = weakref.finalize(again, self.pool.taken.remove, blocks[0])
        return first, again

    def poison(self):
        for place in self.places:
            place.fill_(torch.nan)

    def forget(self):
        self.places = []

    def memory(self, kept_alone=False):
        return 2**20

    @staticmethod
    def kept_state(state):
        return state


def share_memory(monkeypatch, recorder):
    """Lets models record with ``recorder``, and poisons what is shared whenever a pass begins."""
    monkeypatch.setattr(graphs, "GraphCapture", lambda: recorder)
    monkeypatch.setattr(graphs, "RUNS_BEFORE_CAPTURE", 1)  # the interpreter takes seconds for a step
    monkeypatch.setattr(buckets, "LEAST_STEP", 3)  # a batch of 20 rows would have no context left
    release, begin_forward = passes.CapturedCall.release, GraphCache.begin_forward

    def poisoning(original):
        def open_and_poison(self, *args):
            recorder = self.recorder
            recorder.poison()
            recorder.within_pass.clear()
            for name, buffer in self._buffers.items():
                recorder.pool.outside.add(buffer.untyped_storage().data_ptr())
                if isinstance(name[0], str | tuple):  # not what is a layer's own
                    buffer.fill_(torch.nan)
            recorder.pool.outside.update(weight.untyped_storage().data_ptr() for weight in args[-2])
            return original(self, *args)

        return open_and_poison

    def release_blocks(self, recorder):
        release(self, recorder)
        if self._replay in recorder.blocks:
            recorder.blocks[self._replay]()

    def begin(self):
        self.recorder.within_forward.clear()
        return begin_forward(self)

    for name in ("open", "open_kept"):
        monkeypatch.setattr(GraphCache, name, poisoning(getattr(GraphCache, name)))
    monkeypatch.setattr(passes.CapturedCall, "release", release_blocks)
    monkeypatch.setattr(GraphCache, "begin_forward", begin)


def checkpointed(stand_in):
    return make_model(stand_in, "reentrant", num_hidden_layers=LAYERS)


def attach_with(model, rules, cuda_graphs, **changes):
    sparsity = every_step() if rules == "rows" else always(**RULES[rules])
    attach(model, {**sparsity, "exact_removal": False, "cuda_graphs": cuda_graphs, **changes})
    state = get_state(model)
    state.config = state.config.model_copy(update={"exact_removal": True})  # the stand-in has no fused loss
    return state


def step_as_recorded(model, batch, rules="both"):
    """Without graphs, of the partition that they would have; ``rules``: a name, or a configuration."""
    if isinstance(rules, str):
        attach_with(model, rules, False)
    else:
        attach(model, rules)
    get_state(model).graphs = Unused(Rerun())
    outcome = loss_and_gradients(model, batch)
    detach(model)
    return outcome


class Unused(GraphCache):
    """They record nothing."""

    def should_replay(self, kind):
        return False


_expected = {}


def small_steps(stand_in, rules="both"):
    """`step_as_recorded` of the small batch and of another of its kind; once for all tests, as it takes seconds."""
    key = rules, whole_layer.post_attention  # plain layers round otherwise
    if key not in _expected:
        batches = small_batch(), other_rows(small_batch())
        _expected[key] = [step_as_recorded(checkpointed(stand_in), batch, rules) for batch in batches]
    return _expected[key]


CALLS = 3
"""In how many calls a checkpointed layer is recorded."""


def other_rows(batch):
    """A batch of the same kind whose rows stand elsewhere, with other tokens."""
    other = {name: values.flip(0) for name, values in batch.items()}
    return {**other, "input_ids": (other["input_ids"] + 7) % 90 + 2}


def take_sums(state):
    """The energy of the chosen rows and of all, of the backward passes since the last call; a flat list, by layer."""
    sums = [value for layer in state.layers for value in state.observer.energy.of(layer.index, CPU).tolist()]
    state.observer.energy.clear()
    return sums
