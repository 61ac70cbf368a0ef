"""Merged micro-batches as preset `auto` plans them, in real trainers: with the results of micro-batches one by one."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from sparse_unsloth import get_state
from sparse_unsloth.attachment import PLAN_NAME
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.planning import progress
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.runtime import auto
from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner

from trainer_models import (
    DENSE,
    SUMS,
    assert_same,
    leak,
    merged,
    model_of,
    run,
    said,
    transformers_trainer,
    trl_trainer,
    words_tokenizer,
)

LAUNCH_BOUND = StepTime(products=1e-9, attention=1e-9, rows=1e-9, sparse_rows=1e-9, host_layer=5, host_sparse_part=0)
BUSY = StepTime(products=1e9, attention=1e9, rows=1e9, sparse_rows=1, host_layer=1e-9, host_sparse_part=0)
AUTO = {"preset": "auto", "backward_rows": 1.0}


@pytest.fixture
def predicted(monkeypatch):
    """Predicts steps by `LAUNCH_BOUND`, or by what ``predicted.step_time`` is set to."""
    fitted = SimpleNamespace(step_time=LAUNCH_BOUND, device="a GPU", backend="peft", dtype="bf16")
    monkeypatch.setattr(auto, "_fitted", lambda state: fitted)
    return fitted


class Decisions(TrainerCallback):
    """The number of merged micro-batches that the plan has at the end of each step."""

    def __init__(self, model):
        self.model, self.found = model, []

    def on_step_end(self, *args, **kwargs):
        self.found.append(get_state(self.model).auto.decision.merged)


def decided(trainer):
    watch = Decisions(trainer.model)
    trainer.add_callback(watch)
    return watch.found


def test_auto_merges_where_launches_are_the_limit(predicted, tmp_path, caplog, capsys):
    """With checkpoints, from which it goes on merged as before; with TRL's trainer; and not where the GPU is busy."""
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    expected = run(transformers_trainer(model_of(DENSE), tmp_path / "alone", **changes))
    trainer = transformers_trainer(model_of(AUTO), tmp_path / "auto", **changes)
    ours = run(trainer)
    assert_same(ours, expected)
    assert merged(trainer) == [4, 4]
    assert (
        "  micro-batches    3.25 as one    3.25x  up to 4 of a step fit in a forward: 10 ms" in capsys.readouterr().out
    )
    folder = tmp_path / "auto" / "checkpoint-1"
    assert SparsityConfig.from_file(folder / PLAN_NAME).merge_micro_batches == 4
    again = transformers_trainer(model_of(AUTO), tmp_path / "again", **changes)
    assert_same((*run(again, resume=str(folder))[:2], ours[2]), ours, means=SUMS)
    assert merged(again)[-1] == 4
    tokenizer = words_tokenizer(tmp_path / "words")
    expected = run(trl_trainer(model_of(DENSE), tmp_path, tokenizer, loss_type="nll", max_steps=2))
    trainer = trl_trainer(model_of(AUTO), tmp_path, tokenizer, loss_type="nll", max_steps=2)
    assert_same(run(trainer), expected, means=("entropy", "mean_token_accuracy"), tolerance=2e-5)
    assert merged(trainer)[0] == 4
    predicted.step_time = BUSY
    trainer = transformers_trainer(model_of(AUTO), tmp_path, max_steps=1)
    assert len(run(trainer)[2].sizes) == 4
    assert merged(trainer) == []
    assert "of them would give 0.9" in capsys.readouterr().out, "a mask computes whole rows"
    assert not [message for message in said(caplog) if "one by one" in message]


@pytest.mark.parametrize("how", ["memory runs out", "documents see each other"])
def test_a_plan_is_mended_to_fewer(how, predicted, tmp_path, caplog):
    models = [model_of(sparsity, dtype=torch.float32) for sparsity in (DENSE, AUTO)]

    def enter(layer, args, kwargs):
        if args[0].shape[1] > 20 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    if how == "memory runs out":
        models[1].get_base_model().model.layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    else:
        for model in models:
            leak(model)
    runs = []
    for model in models:
        trainer = transformers_trainer(model, tmp_path, [(4, 3)] * 12, max_steps=3)
        found = decided(trainer) if model is models[1] else []
        runs.append(run(trainer))
    assert_same(runs[1], runs[0], tolerance=1e-5)
    assert found == [2 if how == "memory runs out" else 1] * 3
    assert merged(trainer)[-1] == found[-1]
    assert len([message for message in said(caplog) if "one by one" in message]) == 1


def test_a_plan_comes_to_merge_in_the_middle_of_a_training(predicted, tmp_path, monkeypatch, capsys):
    """The device turns out to be so fast that launches are the limit: a thousandth of a second between two forwards."""
    ticks = itertools.count()
    monkeypatch.setattr(auto, "clock", lambda: next(ticks) / 1000)
    monkeypatch.setattr(progress, "WARM_UP", 2)
    monkeypatch.setattr(progress, "MEASURED", 2)
    predicted.step_time = StepTime(1e9, 1e9, 1e9, 1, host_layer=5, host_sparse_part=0)
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, max_steps=3))
    trainer = transformers_trainer(model_of(AUTO), tmp_path, max_steps=3)
    found = decided(trainer)
    assert_same(run(trainer), expected)
    assert found == [1, 4, 4], "in its second step"
    assert merged(trainer) == [1, 4]
    assert "a micro-batch measured" in capsys.readouterr().out


def test_a_plan_merges_what_fits_even_if_fewer_layers_keep_activations(predicted, tmp_path, monkeypatch):
    asked = []

    def fits(planner, tokens, of=None, held=0):
        asked.append((tokens, of))
        return tokens <= 20

    monkeypatch.setattr(CheckpointPlanner, "fits", fits)
    trainer = transformers_trainer(
        model_of({**AUTO, "memory_budget": 1.5}), tmp_path, gradient_checkpointing=True, max_steps=3
    )
    sizes = [length for _, length in run(trainer)[2].sizes]
    assert max(sizes) <= 20 < max(tokens for tokens, _ in asked)
    assert {of for _, of in asked} == {None}
    assert 1 < max(merged(trainer)) < 4


@pytest.mark.parametrize(("asked", "sizes"), [(False, 4), (2, 2)])
def test_what_is_set_by_hand_stays_under_auto(asked, sizes, predicted, tmp_path, capsys):
    trainer = transformers_trainer(model_of({**AUTO, "merge_micro_batches": asked}), tmp_path, max_steps=1)
    assert len(run(trainer)[2].sizes) == sizes
    assert f"micro-batches    {'1.86 as one ' if asked else 'one by one  '}" in capsys.readouterr().out
