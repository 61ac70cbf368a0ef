"""NaN and inf during a training: noticed, and contained in the layers after them."""

import logging

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sparse_unsloth import attach, get_state
from sparse_unsloth.channels.score_watch import PAUSE
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT
from sparse_unsloth.runtime.metrics import metrics

from tiny_models import always, loss_and_gradients, make_batch, make_lora

BAD_TOKEN = 3


def poisoned(value, **changes):
    """A model in which one token's embedding holds ``value``, and a batch with that token in a prompt."""
    model = make_lora()
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD_TOKEN] = value
    attach(model, always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}, **changes))
    get_state(model).begin_training("test", max_steps=100)
    get_state(model).set_step(0)
    bad, good = make_batch(seed=1), make_batch(seed=1)
    for batch in (bad, good):
        batch["input_ids"][batch["input_ids"] == BAD_TOKEN] = 4
    bad["input_ids"][0, 0] = BAD_TOKEN
    return model, bad, good


def record_selections(model):
    """The list to which the selections of every later forward are added."""
    seen = []

    def record(model, args, kwargs, output):
        context = kwargs.get(CONTEXT_ARGUMENT)
        seen.append({} if context is None else dict(context.selections))

    model.register_forward_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_noticed_and_their_layers_go_dense(caplog, value):
    model, bad, good = poisoned(value)
    state, seen = get_state(model), record_selections(model)
    model(**good).loss.backward()
    with caplog.at_level(logging.WARNING, logger="sparse_unsloth"):
        model(**bad)
        model.zero_grad()
        state.set_step(1)
        loss, _ = loss_and_gradients(model, good)
    chosen = seen[1][1, "mlp"].channels
    assert torch.equal(chosen, torch.arange(len(chosen))), "NaN ranks last, equal scores in channel order"
    assert "NaN or inf in the scores of 3 parts" in caplog.text
    assert "layers.1.mlp, " in caplog.text
    assert "dense in the next 10 forwards" in caplog.text
    assert seen[2] == {}, "dense"
    dense = make_lora()
    assert torch.equal(loss, loss_and_gradients(dense, good)[0])
    state.verify_step()
    assert metrics(state)["sparsity/nonfinite"] == 3
    assert "sparsity/nonfinite" not in metrics(state)
    for _ in range(PAUSE - 1):
        model(**good)
    assert seen[-1] == {}
    state.set_step(2)
    loss, gradients = loss_and_gradients(model, good)
    assert set(seen[-1]) == set(seen[0]) == {(1, "mlp"), (2, "mlp"), (2, "self_attn")}
    assert torch.isfinite(loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    state.verify_step()
    assert caplog.text.count("NaN or inf") == 1, "said once, counted always"


def test_only_the_layers_behind_the_fault_go_dense(monkeypatch):
    model, _, good = poisoned(0.0)
    seen = record_selections(model)
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: output * float("inf"))
    model(**good)
    handle.remove()
    model(**good)
    assert set(seen[1]) == {(1, "mlp")}


class HostReads(TorchFunctionMode):
    """How often the host asks for the value of a tensor."""

    names = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.methods = {getattr(torch.Tensor, name) for name in self.names}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.methods
        return function(*args, **(kwargs or {}))


def test_looking_for_them_costs_one_read_a_forward_whatever_the_number_of_layers():
    counts = []
    for layers in (3, 6):
        model = make_lora(num_hidden_layers=layers)
        attach(model, always())
        model(**make_batch())
        selects = get_state(model).selector
        with HostReads() as reads:
            model(**make_batch())
        counts.append(reads.count)
        assert selects is get_state(model).selector
    assert counts[0] == counts[1]
