"""Whole layers that are recorded by a stand-in, which runs their functions again."""

import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.graphs import buckets
from sparse_unsloth.graphs import recorder as graphs
from sparse_unsloth.graphs.recorder import GraphCache

from masked_models import every_step
from tiny_models import always, loss_and_gradients
from whole_layers import make_model, small_batch

LAYERS = 2


RULES = {
    "both": {"mlp": {"0-1": 0.6}, "self_attn": {"1": 0.5}},
    "attention alone": {"mlp": {}, "self_attn": {"0": 0.5}},
    "no dense rows": {"mlp": {"1": 0.6}, "self_attn": {"1": 0.5}, "dense_tokens": "none"},
    "nothing dropped": {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}},
    "dense": {"mlp": {}, "self_attn": {}},
}


class Rerun:
    """Runs a recorded function again, and writes what it returns to where the first outputs lay."""

    def __init__(self):
        self.recorded = 0
        self.replayed = 0
        self.places = []
        self.within_pass = set()

    def note(self, what):
        """A pass that is replayed in part does not hold what recording the rest would have to leave alone."""
        self.within_pass.add(what)
        assert len(self.within_pass) == 1

    def capture(self, function):
        self.recorded += 1
        self.note("recorded")
        first = [output.clone() for output in function()]
        places = [output.clone() for output in first]
        self.places += places

        def again():
            self.replayed += 1
            self.note("replayed")
            for place, output in zip(places, function(), strict=True):
                place.copy_(output)
            return places

        return first, again

    def poison(self):
        for place in self.places:
            place.fill_(torch.nan)

    def forget(self):
        self.places = []

    @staticmethod
    def kept_state(state):
        return state


def share_memory(monkeypatch, recorder):
    """Lets models record with ``recorder``, and poisons what is shared whenever a pass begins."""
    monkeypatch.setattr(graphs, "GraphCapture", lambda: recorder)
    monkeypatch.setattr(graphs, "RUNS_BEFORE_CAPTURE", 1)  # the interpreter takes seconds for a step
    monkeypatch.setattr(buckets, "LEAST_STEP", 3)  # a batch of 20 rows would have no context left
    original = GraphCache.open

    def open_and_poison(self, *args):
        recorder.poison()
        recorder.within_pass.clear()
        for name, buffer in self._buffers.items():
            # Not what is a layer's own, nor the gradient that one layer leaves for the one before.
            if isinstance(name[0], str | tuple) and name[0] != "gradient":
                buffer.fill_(torch.nan)
        return original(self, *args)

    monkeypatch.setattr(GraphCache, "open", open_and_poison)


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
    if rules not in _expected:
        batches = small_batch(), other_rows(small_batch())
        _expected[rules] = [step_as_recorded(checkpointed(stand_in), batch, rules) for batch in batches]
    return _expected[rules]


FORMS = {"whole": 3, "parts": 8}
"""How a layer is recorded, and in how many calls."""


def other_rows(batch):
    """A batch of the same kind whose rows stand elsewhere, with other tokens."""
    other = {name: values.flip(0) for name, values in batch.items()}
    return {**other, "input_ids": (other["input_ids"] + 7) % 90 + 2}
