"""`SparsityCallback` in real trainers: calls, logs, resuming, other drivers, registration."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module

from sparse_unsloth import callback
from sparse_unsloth.callback import SparsityCallback, register_with_trainers, unregister_from_trainers
from sparse_unsloth.config.sparsity import SparsityConfig


class Line(nn.Module):
    """y = a x + b, with a trainer's loss."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return {"loss": (self.a * x + self.b - labels).square().mean()}


class FakeState:
    """The part of SparsityState that `SparsityCallback` uses; notes the calls."""

    def __init__(self, config=None, num_layers=4):
        self.config = config or SparsityConfig(preset="o2", start_step=1, end_step=3)
        self.layers = range(num_layers)
        self.driver = self.auto = None
        self.row_sparse = False
        self.calls = []
        self.since_log = 0
        self.observer = SimpleNamespace(take=list)

    def begin_training(self, driver, max_steps, train_dataset=None, collate_fn=None):
        self.driver, self.max_steps = driver, max_steps
        self.train_dataset, self.collate_fn = train_dataset, collate_fn
        self.calls.append("begin")

    def set_step(self, step):
        self.calls.append(f"step {step}")
        self.scale = self.config.schedule.scale(step, self.max_steps)

    def verify_step(self):
        self.calls.append("verify")
        self.since_log += 1

    def metrics(self):
        found = {"sparsity/scale": self.scale, "sparsity/steps": float(self.since_log)}
        self.since_log = 0
        return found

    def end_training(self):
        self.driver = None
        self.calls.append("end")


class Integration(TrainerCallback):
    """Stands for a `report_to` integration."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


ROWS = [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(16)]


@pytest.fixture
def attached(monkeypatch):
    """The states of attached models, by model."""
    states = {}
    monkeypatch.setattr(callback, "get_state", states.get)
    monkeypatch.setattr(callback, "metrics", FakeState.metrics)
    return states


@pytest.fixture
def registered():
    before = list(trainer_module.DEFAULT_CALLBACKS)
    register_with_trainers()
    yield
    trainer_module.DEFAULT_CALLBACKS[:] = before


def build(model, folder, callbacks=(), dataset=ROWS, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    args = TrainingArguments(**settings | changes)
    return Trainer(model=model, args=args, train_dataset=dataset, eval_dataset=ROWS[:2], callbacks=list(callbacks))


def test_call_order_and_what_training_begins_with(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    trainer = build(model, tmp_path)
    trainer.train()
    steps = [call for i in range(4) for call in (f"step {i}", "verify")]
    assert state.calls == ["begin", *steps, "end"]
    assert state.max_steps == 4
    assert state.driver is None
    assert list(state.train_dataset) == ROWS
    assert set(state.collate_fn(list(state.train_dataset)[:2])) == {"x", "labels"}


def test_metrics_reach_integrations_and_the_history(attached, registered, tmp_path):
    model, integration = Line(), Integration()
    attached[model] = FakeState()
    trainer = build(model, tmp_path, [integration])
    trainer.train()
    expected = [
        {"sparsity/scale": 1.0, "sparsity/steps": 2.0},
        {"sparsity/scale": 0.0, "sparsity/steps": 2.0},
    ]
    for lines in (integration.logs, trainer.state.log_history):
        training = [line for line in lines if "loss" in line]
        assert [{key: line[key] for key in line if key.startswith("sparsity/")} for line in training] == expected
    assert not any(key.startswith("sparsity/") for key in integration.logs[-1])  # the closing summary


def test_evaluation_does_not_take_the_training_metrics(attached, registered, tmp_path):
    model, integration = Line(), Integration()
    attached[model] = FakeState()
    trainer = build(model, tmp_path, [integration], eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [line for line in integration.logs if "eval_loss" in line]
    assert len(evaluations) == 4
    assert not any(key.startswith("sparsity/") for line in evaluations for key in line)
    assert [line["sparsity/steps"] for line in integration.logs if "loss" in line] == [2.0, 2.0]
    trainer.evaluate()
    assert attached[model].calls[-1] == "end"


def test_resume_goes_on_at_the_checkpoints_step(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    build(model, tmp_path, save_strategy="steps", save_steps=2).train()
    whole = state.calls
    resumed_model, resumed = Line(), FakeState()
    attached[resumed_model] = resumed
    trainer = build(resumed_model, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.calls == ["begin", *whole[whole.index("step 2") :]]
    torch.testing.assert_close(resumed_model.a, model.a)


def test_models_that_are_not_attached_are_left_alone(attached, registered, tmp_path):
    integration = Integration()
    build(Line(), tmp_path, [integration]).train()
    assert [line for line in integration.logs if "loss" in line]
    assert not any(key.startswith("sparsity/") for line in integration.logs for key in line)


def test_a_second_instance_stays_passive(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    trainer = build(model, tmp_path, [SparsityCallback()])
    trainer.train()
    first, second = (cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SparsityCallback))
    assert first is not second
    assert state.calls.count("begin") == state.calls.count("end") == 1
    assert state.calls.count("verify") == 4
    assert [line["sparsity/steps"] for line in trainer.state.log_history if "loss" in line] == [2.0, 2.0]


def test_a_callback_added_by_hand_drives_where_none_is_registered(attached, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    trainer = build(model, tmp_path, [SparsityCallback()])
    trainer.train()
    assert state.calls[0] == "begin"
    assert [line["sparsity/steps"] for line in trainer.state.log_history if "loss" in line] == [2.0, 2.0]


def test_another_driver_keeps_the_wheel(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    state.driver = own_loop = object()
    build(model, tmp_path).train()
    assert state.calls == []
    assert state.driver is own_loop


def test_a_new_trainer_takes_over_from_an_interrupted_one(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path, [Interrupt()]).train()
    assert state.driver is not None
    state.calls.clear()
    build(model, tmp_path, [SparsityCallback()]).train()
    assert state.calls.count("begin") == state.calls.count("end") == 1
    assert state.calls.count("verify") == 4


def test_one_trainer_may_train_twice(attached, registered, tmp_path):
    model, state = Line(), FakeState()
    attached[model] = state
    trainer = build(model, tmp_path)
    trainer.train()
    trainer.train()
    assert state.calls.count("begin") == state.calls.count("end") == 2


def test_iterable_datasets(attached, registered, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    model, state = Line(), FakeState()
    attached[model] = state
    build(model, tmp_path, dataset=Stream()).train()
    assert state.calls.count("verify") == 4
    assert next(iter(state.train_dataset)) == ROWS[0]


@pytest.mark.parametrize("loader", [None, SimpleNamespace()])
def test_loaders_without_a_dataset(attached, loader):
    model, state = Line(), FakeState()
    attached[model] = state
    trainer_state = SimpleNamespace(max_steps=4, global_step=0, log_history=[], is_world_process_zero=False)
    SparsityCallback().on_train_begin(None, trainer_state, None, model=model, train_dataloader=loader)
    assert (state.train_dataset, state.collate_fn) == (None, None)


def test_a_training_that_would_be_dense_throughout_says_so(attached, registered, tmp_path, caplog):
    model = Line()
    attached[model] = FakeState(SparsityConfig(preset="o2", start_step=50, end_step=200))
    with caplog.at_level(logging.WARNING, "sparse_unsloth"):
        build(model, tmp_path).train()
        attached[model] = FakeState(SparsityConfig(preset="dense", start_step=50, end_step=200))
        build(model, tmp_path).train()
        attached[model] = FakeState(SparsityConfig(preset="rows", start_step=50, end_step=200))
        build(model, tmp_path).train()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sparse_unsloth")] == [
        "The whole training will be dense: none of its 4 optimiser steps lies between start_step=50 and end_step=200. "
        "Train longer, or set start_step and end_step to fit."
    ] * 2


def test_registration_is_idempotent_and_reversible(registered, tmp_path):
    register_with_trainers()
    assert trainer_module.DEFAULT_CALLBACKS.count(SparsityCallback) == 1
    unregister_from_trainers()
    unregister_from_trainers()
    assert SparsityCallback not in trainer_module.DEFAULT_CALLBACKS
    assert not any(isinstance(cb, SparsityCallback) for cb in build(Line(), tmp_path).callback_handler.callbacks)
