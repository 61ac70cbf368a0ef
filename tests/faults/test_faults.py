"""Faults in the middle of a training that goes on: out of memory, NaN and inf, several models, threads, workers."""

import logging
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.context import CONTEXT_ARGUMENT
from sparse_unsloth.functions import linear, mlp
from sparse_unsloth.metrics import metrics
from sparse_unsloth.nonfinite import PAUSE

import endurance
from tiny_models import always, loss_and_gradients, make_batch, make_lora


def attached(seed=0, checkpointing=False, **changes):
    model = make_lora(seed=seed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    attach(model, always(**changes))
    return model


def assert_equal(ours, expected):
    assert torch.equal(ours[0], expected[0])
    assert ours[1].keys() == expected[1].keys()
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in expected[1].items())


# Out of memory


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("function", [mlp._SparseMlp, linear._SparseLinear], ids=["mlp", "attention"])
def test_out_of_memory_in_a_step_leaves_a_usable_model(monkeypatch, function, direction, checkpointing):
    model, batch = attached(checkpointing=checkpointing), make_batch()
    expected = loss_and_gradients(model, batch)
    original, calls = getattr(function, direction), []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 2:  # the second layer's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(function, direction, staticmethod(fails_once))
        with pytest.raises(torch.OutOfMemoryError):
            loss_and_gradients(model, batch)
    assert all(runtime.context is None for runtime in get_state(model).runtimes.values())
    assert_equal(loss_and_gradients(model, batch), expected)
    model.eval()
    dense = make_lora().eval()
    assert torch.equal(model(**batch).logits, dense(**batch).logits)


# NaN and inf

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
    """The selections of every forward from here on."""
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


# Several models, threads, workers


def test_two_models_attached_at_once_do_not_disturb_each_other():
    settings = ({"mlp": {"all": 0.6}}, {"mlp": {"1-2": 0.3}, "self_attn": {"all": 0.75}, "dense_tokens": "none"})
    batches = make_batch(0), make_batch(1, lengths=((4, 9), (12, 3)))
    alone = []
    for seed, (setting, batch) in enumerate(zip(settings, batches, strict=True)):
        alone.append(loss_and_gradients(attached(seed, checkpointing=True, **setting), batch))
    models = [attached(seed, checkpointing=True, **setting) for seed, setting in enumerate(settings)]
    losses = [model(**batch).loss for model, batch in zip(models, batches, strict=True)]
    for loss in losses:
        loss.backward()
    for model, loss, expected in zip(models, losses, alone, strict=True):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_equal((loss.detach(), gradients), expected)
    detach(models[0])
    assert_equal(loss_and_gradients(models[1], batches[1]), alone[1])


def test_models_trained_in_threads_of_their_own():
    batches = [make_batch(seed) for seed in range(4)]
    expected = [loss_and_gradients(attached(seed), batch) for seed, batch in enumerate(batches)]
    models, found = [attached(seed) for seed in range(4)], {}

    def train(seed):
        for _ in range(3):
            found[seed] = loss_and_gradients(models[seed], batches[seed])

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_equal(found[seed], expected[seed])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_data_loader_leave_the_model_alone(workers):
    """They fork a process in which the model is attached, and read the data set in a thread of this one."""
    rows = [{name: value[0] for name, value in make_batch(seed).items()} for seed in range(8)]
    model, plain = attached(), attached()
    loader = DataLoader(rows, batch_size=2, num_workers=workers, persistent_workers=bool(workers))
    for _ in range(2):
        for number, batch in enumerate(loader):
            ours = loss_and_gradients(model, batch)
            whole = {name: torch.stack([rows[2 * number + n][name] for n in range(2)]) for name in batch}
            assert_equal(ours, loss_and_gradients(plain, whole))


# Attaching again, and again


def test_attach_and_detach_leave_nothing_behind():
    model, batch = make_lora(), make_batch()
    dense, hooks = loss_and_gradients(model, batch), endurance.count_hooks(model)
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    sparse = None
    for _ in range(5):
        attach(model, always())
        ours = loss_and_gradients(model, batch)
        sparse = ours if sparse is None else sparse
        assert_equal(ours, sparse)
        detach(model)
        assert endurance.count_hooks(model) == hooks
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert_equal(loss_and_gradients(model, batch), dense)


@pytest.mark.parametrize("rows", [False, True])
def test_nothing_grows_in_a_short_run(rows):
    """The long one is `endurance.py`, its figures `endurance.json`; here times decide nothing."""
    windows = endurance.run(100, rows)
    assert windows[-1]["hooks"] == windows[1]["hooks"]
    # What an observation (explain_steps) looks at stays until the next one, so the first one comes before the start.
    assert windows[-1]["tensors"] == windows[-4]["tensors"]
