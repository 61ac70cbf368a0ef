"""Merged micro-batches in real trainers: everything as with micro-batches one by one, with fewer forwards."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner
from sparse_unsloth.runtime.merging import MicroBatchMerger, begin_merging

from trainer_models import (
    DENSE,
    EIGHT,
    FLAT,
    LENGTHS,
    PADDED,
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

HOW = {"merged": EIGHT, "one by one": DENSE}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return words_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("sparsity", [{}, {"backward_rows": 0.9999}], ids=["dense", "every row, through what chooses"])
def test_transformers_trainer_padding_free(sparsity, tmp_path, caplog):
    """Steps of four and, at the end of each epoch, one; with evaluations between, and a learning rate that changes."""
    changes = {"eval_strategy": "steps", "eval_steps": 2, "warmup_steps": 2, "max_steps": 8, "logging_steps": 2}
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, **changes))
    trainer = transformers_trainer(model_of({**sparsity, "merge_micro_batches": 8}), tmp_path, **changes)
    ours = run(trainer)
    plain = [{name: value for name, value in line.items() if "sparsity" not in name} for line in ours[1]]
    assert_same((ours[0], plain, ours[2]), expected)
    assert merged(trainer) == [4, 2.5, 4, 2.5]
    assert [length for _, length in ours[2].sizes][:2] == [24, 31]
    assert said(caplog) == []


def test_running_sums_and_larger_micro_batches(tmp_path):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, collator=collator))
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = transformers_trainer(
        model_of({**DENSE, "merge_micro_batches": 2}), tmp_path, collator=collator, **changes
    )
    ours = run(trainer)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=1e-7)
    assert merged(trainer) == [2, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("changes", [{}, {"loss_type": "nll"}, {"packing": True, "max_length": 12}], ids=str)
def test_trl(changes, tmp_path, tokenizer, caplog):
    expected = run(trl_trainer(model_of(DENSE), tmp_path, tokenizer, **changes))
    trainer = trl_trainer(model_of(EIGHT), tmp_path, tokenizer, **changes)
    ours = run(trainer)
    assert_same(ours, expected, means=("entropy", "mean_token_accuracy"), tolerance=2e-5)  # TRL's loss is in float32
    assert merged(trainer)[0] == 4
    assert [message.split(":")[1] for message in said(caplog)] == [
        " TRL's entropy and mean_token_accuracy are means over the tokens of merged micro-batches, no longer over "
        "micro-batches; every other figure is logged as without it."
    ]


def test_padded_micro_batches(tmp_path, caplog):
    """Those of nearly the same length are merged; others run one by one, and one line says so."""
    lengths = [(30, 8), (31, 8), (20, 19), (30, 10), (33, 4), (30, 8), (19, 20), (1, 38)]
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, lengths, PADDED))
    trainer = transformers_trainer(model_of(EIGHT), tmp_path, lengths, PADDED)
    ours = run(trainer)
    assert_same(ours, expected)
    assert set(merged(trainer)) == {4.0}
    assert {rows for rows, _ in ours[2].sizes} == {4}
    assert said(caplog) == []
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, collator=PADDED))
    trainer = transformers_trainer(model_of(EIGHT), tmp_path, collator=PADDED)
    ours = run(trainer)
    assert_same(ours, expected)
    tokens = sum(length for _, length in expected[2].sizes)
    assert sum(rows * length for rows, length in ours[2].sizes) <= 1.05 * tokens, (
        "those of similar lengths, neighbours or not"
    )
    assert len(ours[2].sizes) < len(expected[2].sizes)
    assert len(said(caplog)) == 1, "in some steps no two have one length"
    assert "padded to different lengths, and padding would grow. padding_free=True" in said(caplog)[0]


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = {name: run(transformers_trainer(model_of(how), tmp_path / name, **changes)) for name, how in HOW.items()}
    assert_same(whole["merged"], whole["one by one"])
    for before, after in (("merged", "merged"), ("one by one", "merged"), ("merged", "one by one")):
        trainer = transformers_trainer(model_of(HOW[after]), tmp_path / "again", **changes)
        ours = run(trainer, resume=str(tmp_path / before / "checkpoint-2"))
        assert_same((*ours[:2], whole["merged"][2]), whole[before if before == after else "one by one"], means=SUMS)
        assert trainer.state.global_step == 5
        assert merged(trainer)[-3:] == {"merged": [4, 1, 4], "one by one": []}[after] or before == "merged"


@pytest.mark.parametrize("where", ["forward", "backward", "proof"])
@pytest.mark.parametrize("sparsity", [{}, {"backward_rows": 0.9999}], ids=["dense", "rows"])
def test_out_of_memory_loses_nothing(where, sparsity, tmp_path, tokenizer, caplog):
    """A second group of a step fails, with the first one's gradients there, and some of its own."""
    expected = run(trl_trainer(model_of(DENSE), tmp_path, tokenizer, loss_type="nll"))
    model = model_of({**sparsity, "merge_micro_batches": 2})
    failed = []

    def enter(layer, args, kwargs, output):
        length, graded = (11, False) if where == "proof" else (19, True)
        if output.shape[1] != length or torch.is_grad_enabled() != graded or failed:
            return
        failed.append(output.shape)
        if where == "backward":
            output.register_hook(fail)
        else:
            fail()

    def fail(*ignored):
        raise torch.OutOfMemoryError("as a test wants it")

    model.get_base_model().model.layers[0].register_forward_hook(enter, with_kwargs=True)
    trainer = trl_trainer(model, tmp_path, tokenizer, loss_type="nll")
    ours = run(trainer)
    plain = [{name: value for name, value in line.items() if "sparsity/" not in name} for line in ours[1]]
    assert_same((ours[0], plain, ours[2]), expected, means=("entropy", "mean_token_accuracy"), tolerance=2e-5)
    assert failed
    assert (
        "2 micro-batches together ran out of memory. They ran again one by one, and none runs together"
        in said(caplog)[1]
    )
    assert merged(trainer)[-1] == 1


def test_fewer_after_memory_ran_out(tmp_path, caplog):
    model, freed = model_of(EIGHT), []

    def enter(layer, args, kwargs):
        if args[0].shape[1] > 20 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    model.get_base_model().model.layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    trainer = transformers_trainer(model, tmp_path, [(4, 3)] * 12)
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, [(4, 3)] * 12))
    zoo = SimpleNamespace(reset_unsloth_gradient_checkpointing_buffers=lambda: freed.append("buffers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unsloth_zoo.gradient_checkpointing", zoo)
        get_state(model).graphs = SimpleNamespace(clear=lambda: freed.append("graphs"), kept_memory=0)
        assert_same(run(trainer), expected)
    assert freed == ["graphs", "buffers", "graphs"], "the last one when training ends"
    assert "4 micro-batches together ran out of memory. They ran again one by one, and at most 2 run" in said(caplog)[0]
    assert merged(trainer) == [1, 2, 2, 2, 2, 2]


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def test_micro_batches_that_were_passed_over_run_when_memory_ran_out(tmp_path, caplog):
    """Of 0 to 3 the inner two are joined first, and the outer two, of which one was passed over by then, come after."""
    lengths = [(30, 8), (18, 2), (15, 5), (20, 18)]
    expected = run(transformers_trainer(model_of(DENSE), tmp_path, lengths, PADDED, cls=InOrder))
    model, failed = model_of(EIGHT), []

    def enter(layer, args, kwargs):
        if args[0].shape[:2] == (2, 20) and torch.is_grad_enabled() and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError

    model.get_base_model().model.layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    trainer = transformers_trainer(model, tmp_path, lengths, PADDED, cls=InOrder)
    assert_same(run(trainer), expected)
    assert failed
    assert "none runs together" in said(caplog)[0]


def forget_the_divisor(model):
    base = model.get_base_model()
    base.loss_function = lambda logits, labels, vocab_size, num_items_in_batch=None, **others: ForCausalLMLoss(
        logits, labels, vocab_size
    )


@pytest.mark.parametrize("break_it", [leak, forget_the_divisor])
def test_a_model_that_merging_would_change_trains_as_before(break_it, tmp_path, caplog):
    runs = []
    for sparsity in (DENSE, EIGHT):
        model = model_of(sparsity, dtype=torch.float32)
        break_it(model)
        runs.append(run(transformers_trainer(model, tmp_path, max_steps=3)))
    assert_same(runs[1], runs[0])
    assert runs[0][2].sizes == runs[1][2].sizes
    assert "joined they do not give the sum of their losses" in said(caplog)[0]


class OwnLoss(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def with_dropout(model):
    model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("sparsity", "changes", "prepare", "reason"),
    [
        ({}, {"gradient_accumulation_steps": 1}, None, "gradient_accumulation_steps is 1"),
        ({}, {"label_smoothing_factor": 0.1}, None, "label_smoothing_factor makes another loss"),
        ({}, {"neftune_noise_alpha": 5.0}, None, "neftune_noise_alpha adds other noise"),
        ({}, {}, with_dropout, "dropout (lora_dropout, attention_dropout) would draw other numbers"),
        ({}, {"cls": OwnLoss}, None, "the compute_loss of this OwnLoss is not that of transformers' Trainer or an SFT"),
        ({"preset": None, "mlp": {"all": 0.5}, "criterion": "magnitude"}, {}, None, "channels are selected for each"),
        ({"merge_micro_batches": True}, {}, None, "without a GPU it is not known how many fit; give their number"),
        (
            {},
            {"collator": lambda rows: {**FLAT(rows), "seq_idx": torch.zeros(1)}},
            None,
            "not known how seq_idx of two",
        ),
    ],
)
def test_what_is_not_merged_says_why(sparsity, changes, prepare, reason, tmp_path, caplog):
    model = model_of({**EIGHT, **sparsity})
    if prepare:
        prepare(model)
    if "collator" in changes:
        model.get_base_model().register_forward_pre_hook(lambda *call: (call[1], drop(call[2])), with_kwargs=True)
    trainer = transformers_trainer(model, tmp_path, max_steps=2, **changes)
    watch = run(trainer)[2]
    assert len(watch.sizes) == 2 * trainer.args.gradient_accumulation_steps
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith("merge_micro_batches: micro-batches run one by one: ")
    assert reason in said(caplog)[0]


def drop(arguments):
    return {name: value for name, value in arguments.items() if name != "seq_idx"}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_as_many_as_the_memory_holds(checkpointing, tmp_path, caplog):
    """A budget in GiB decides, on a CPU too; layers that keep their activations do not become fewer."""
    model = model_of({**DENSE, "merge_micro_batches": True, "memory_budget": 1.5}, dtype=torch.float32)
    trainer = transformers_trainer(model, tmp_path, gradient_checkpointing=checkpointing)
    asked = []

    def fits(planner, tokens, of=None, held=0):
        asked.append((tokens, of))
        return tokens <= 20

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointPlanner, "fits", fits)
        ours = run(trainer)
    assert max(length for _, length in ours[2].sizes) <= 20
    assert max(size for size, _ in asked) > 20
    assert all(of for _, of in asked)
    assert_same(ours, run(transformers_trainer(model_of(DENSE, dtype=torch.float32), tmp_path)), tolerance=1e-4)
    assert 1 < max(merged(trainer)) <= 2
    run(again := transformers_trainer(model, tmp_path, gradient_checkpointing=checkpointing))
    assert merged(again)[0] == 4


def test_an_interrupted_trainer_trains_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = transformers_trainer(model_of(EIGHT), tmp_path)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    model = trainer.model
    detach(model)
    assert {rows * length for rows, length in run(trainer)[2].sizes} == {sum(pair) for pair in LENGTHS}
    attach(model, EIGHT)
    run(trainer)
    assert merged(trainer) == [4, 4, 4, 1, 4, 4]
    assert get_state(trainer.model).driver is None


def test_a_state_that_no_caller_has(caplog):
    assert begin_merging(get_state(model_of(EIGHT)), object()) is None
    assert said(caplog) == ["merge_micro_batches: micro-batches run one by one: its trainer was not found."]
    assert begin_merging(get_state(model_of(DENSE)), object()) is None


def test_processes_agree_on_groups():
    merger = object.__new__(MicroBatchMerger)
    merger._gather = lambda starts: list(zip(starts, [1, 0, 0, 1, 0, 0], strict=True))
    assert merger._agree([[0, 1], [2, 3, 4, 5]]) == [[0, 1], [2], [3, 4, 5]]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
@pytest.mark.installed_unsloth("merging")
def test_the_installed_unsloths_trainers(unsloth_case):
    """Its own, the one that it compiles in place of TRL's, and transformers'."""
    ((found,), _) = unsloth_case
    assert len(found) == 4
    for name, how in found.items():
        assert how["weights"] < 1e-5, name
        assert how["log"] < 1e-5, name
        assert how["moved"] > 1e-3, name
        assert len(how["merged"]) == 4, name
        assert 14 <= len(how["alone"]) <= 15, name  # Unsloth runs a first forward again, without TRL's figures
