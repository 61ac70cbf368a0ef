"""Faults in the middle of a training that goes on: out of memory, several models, threads, workers."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.ops import linear, mlp

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
