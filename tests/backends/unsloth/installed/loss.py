"""Skipping unused rows, compared with the installed Unsloth's own loss and forwards; part of `release`."""

import functools
import importlib
import os

import torch

from sparse_unsloth.exact.loss import MODULES, install_loss_removal
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT

from loss_model import BATCH, SEQUENCE, Model, assert_same, make_labels, run
from tiny_models import make_base


def compare_with_unsloth():
    """The loss alone with every argument, then whole forwards of Unsloth's families."""
    modules = [importlib.import_module(name) for name in MODULES]
    original = modules[0].unsloth_fused_ce_loss
    rows = []

    def recording(trainer, hidden_states, *args, **kwargs):
        rows.append(hidden_states.shape[0] * hidden_states.shape[1])
        return original(trainer, hidden_states, *args, **kwargs)

    functools.update_wrapper(recording, original)
    for module in modules:
        module.unsloth_fused_ce_loss = recording
    compare_losses(rows)
    compare_forwards(modules, rows)
    for module in modules:
        module.unsloth_fused_ce_loss = original
    for family in ("gemma", "gemma2", "qwen2", "qwen3"):
        module = importlib.import_module(f"unsloth.models.{family}")
        assert module.CausalLM_fast_forward is modules[0].CausalLM_fast_forward, f"{family} has a forward of its own"


def compare_losses(rows):
    left_padded = make_labels(0.5)
    left_padded[:, : SEQUENCE // 2] = -100
    cases = {"some": make_labels(0.5), "none": make_labels(0), "all": make_labels(1), "left": left_padded}
    options = [
        {},
        {"n_items": 100},
        {"n_items": torch.tensor(100)},
        {"scaling": 8.0},
        {"logit_softcapping": 0.5, "logit_scale_multiply": 3.0, "logit_scale_divide": 2.0},
        {"n_chunks": 3, "label_smoothing": 0.1},
    ]
    for name, labels in cases.items():
        for option in options:
            model = Model()
            expected = run(model, labels, **option)
            removal = install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
            assert_same(run(model, labels, **option), expected)
            removal.remove()
            assert rows[-2:] == [
                BATCH * SEQUENCE,
                BATCH * SEQUENCE if name == "all" else 128 if name != "some" else 256,
            ]
            assert (expected[0] == 0) == (name == "none")


def compare_forwards(modules, rows):
    llama, mistral = modules
    labels = make_labels(0.5)
    batch = {"input_ids": labels.clamp_min(3), "labels": labels}
    packed = {name: value.view(1, -1) for name, value in batch.items()}
    packed["packed_seq_lengths"] = torch.tensor([100, 50, 200, 90])
    for family, forward in (
        ("llama", llama.CausalLM_fast_forward(None)),
        ("mistral", mistral.MistralForCausalLM_fast_forward),
    ):
        model = make_base(family, max_position_embeddings=512).train()
        weights = list(model.parameters())

        def outcome(batch, forward=forward, model=model, weights=weights, **kwargs):
            loss = forward(model, **batch, **kwargs).loss
            return loss, *torch.autograd.grad(loss, weights)

        expected = [outcome(batch), outcome(packed), outcome(batch, num_items_in_batch=torch.tensor(70))]
        removal = install_loss_removal(model, model.model.layers[-1], CONTEXT_ARGUMENT)
        del rows[:]
        assert_same(outcome(batch), expected[0])
        assert_same(outcome(packed), expected[1])
        assert_same(outcome(batch, num_items_in_batch=torch.tensor(70)), expected[2])
        assert rows == [256, 256, 256]
        with torch.no_grad():
            model.eval()
            torch.testing.assert_close(forward(model, **batch).loss, expected[0][0])
            os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
            assert forward(model, **{**batch, "labels": None}).logits.shape == (*labels.shape, 96)
            del os.environ["UNSLOTH_RETURN_LOGITS"]
        assert len(rows) == 4
        removal.remove()
