"""`GradientCosine`: the right cosine, and a training that does not see the measurement."""

import copy

import pytest
import torch
import transformers

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.runtime import cosine
from sparse_unsloth.runtime.cosine import METRIC, GradientCosine, begin_cosine

from tiny_models import loras, loss_and_gradients, make_batch, make_lora

ROWS = {"backward_rows": 0.25}


def noisy(model):
    """``model``, whose forward draws random numbers."""
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: output + 0.1 * torch.randn_like(output))
    return model


def trained(folder, checkpointing, **changes):
    """Weights and log of a real training."""
    model = noisy(make_lora())
    attach(model, {**ROWS, **changes})
    rows = [{name: value[0] for name, value in make_batch(seed).items()} for seed in range(8)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=5, logging_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, optim="adamw_torch",
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
    )  # fmt: skip
    if checkpointing:
        model.enable_input_require_grads()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {name: weight.detach().clone() for name, weight in loras(model).items()}, log


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_training_is_bitwise_the_same(checkpointing, tmp_path, caplog):
    weights, log = trained(tmp_path, checkpointing)
    measured, with_cosine = trained(tmp_path, checkpointing, cosine_steps=2)
    assert all(torch.equal(weights[name], measured[name]) for name in weights)
    found = [line.pop(METRIC, None) for line in with_cosine]
    assert with_cosine == log
    assert [value is not None for value in found] == [False, False, True, False, True]  # steps 0, 1, 2, ...
    assert all(0.2 < value < 1 for value in found if value is not None)
    assert sum("one micro-batch runs dense as well, forward and backward" in one.message for one in caplog.records) == 1


def test_it_is_the_cosine_of_the_whole_gradient():
    model, batch = make_lora(), make_batch(3)
    dense = loss_and_gradients(copy.deepcopy(model), batch)[1]
    attach(model, ROWS)
    state = get_state(model)
    state.begin_training("test", 100)
    measuring = GradientCosine(state, 4)
    for step in range(4):
        state.set_step(step)
        loss_and_gradients(model, make_batch(step))
        assert measuring.take() == {}
    state.set_step(4)
    model.zero_grad()
    model(**make_batch(9)).loss.backward()  # only the first micro-batch of the step is measured
    model(**batch).loss.backward()
    first = measuring.take()[METRIC]
    state.set_step(8)
    _, ours = loss_and_gradients(model, batch)
    one, other = (torch.cat([each[name].flatten() for name in dense]) for each in (ours, dense))
    expected = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    assert measuring.take() == {METRIC: pytest.approx(expected, rel=1e-5)}
    assert 0 < expected < 0.999 != first
    measuring.remove()
    detach(model)
    assert not model._forward_pre_hooks
    assert not any(parameter._backward_hooks for parameter in loras(model).values())


def test_evaluation_and_dense_steps_are_not_measured(monkeypatch):
    monkeypatch.setattr(cosine, "dense_gradients", lambda *given: pytest.fail("measured"))
    model = make_lora()
    attach(model, {**ROWS, "start_step": 0, "end_step": 2})
    state = get_state(model)
    state.begin_training("test", 100)
    measuring = GradientCosine(state, 1)
    state.set_step(0)
    loss_and_gradients(model, make_batch())
    state.set_step(2)  # dense again
    loss_and_gradients(model, make_batch())
    state.set_step(1)
    with torch.no_grad():
        model(**make_batch())
    model(**{**make_batch(), "labels": None})
    model.eval()(**make_batch())
    assert measuring.take() == {}


def test_what_would_be_disturbed_is_left_alone_and_said(monkeypatch, caplog):
    model = make_lora()
    attach(model, {**ROWS, "cosine_steps": 1})
    state = get_state(model)
    state.begin_training("test", 100)
    monkeypatch.setattr(cosine, "world_size", lambda: 2)
    assert begin_cosine(state) is None
    assert "with several processes" in caplog.text
    monkeypatch.undo()
    measuring, seen = begin_cosine(state), []
    state.set_step(0)
    loss_and_gradients(model, make_batch())
    next(iter(loras(model).values())).register_post_accumulate_grad_hook(seen.append)
    for step in (1, 2):
        state.set_step(step)
        loss_and_gradients(model, make_batch())
    assert len(seen) == 2, "once a backward of the training"
    assert measuring.take() == {}
    assert caplog.text.count("something hooks the gradients of trained parameters") == 1
