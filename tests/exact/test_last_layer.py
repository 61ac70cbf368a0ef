"""Skipping unused rows of the last layer, and the unused output of an MLP's recompute.

That loss and gradients stay the same is shown with Unsloth's own forwards (tests/backends/unsloth/installed/loss.py).
"""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from sparse_unsloth import attach
from sparse_unsloth.exact.last_layer import WORTH_REMOVING, enough_unused_rows, loss_is_fused
from sparse_unsloth.ops.mlp import _GatedMlpRows
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense, rows_with_loss

from tiny_models import always, loss_and_gradients, make_batch, make_lora

LABELS = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, -100, 8]])
LOSS = [1, 2, 5, 8]


def lists(partition):
    return [getattr(partition, name).tolist() for name in ("dense", "context", "padding", "loss")]


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_with_loss_are_dense_and_all_others_padding(sparse):
    narrow = rows_with_loss(TokenPartition.from_labels(LABELS), sparse)
    assert narrow.shape == (2, 5)
    assert lists(narrow) == [LOSS, [], [0, 3, 4, 6, 7, 9], LOSS]


def test_rows_with_loss_stay_context_where_no_row_is_dense():
    partition = TokenPartition.from_labels(LABELS, dense_tokens="none")
    assert lists(rows_with_loss(partition, sparse=True)) == [[], LOSS, [0, 3, 4, 6, 7, 9], LOSS]
    assert lists(rows_with_loss(partition, sparse=False)) == [LOSS, [], [0, 3, 4, 6, 7, 9], LOSS]


def test_no_loss_at_all():
    narrow = rows_with_loss(TokenPartition.from_labels(torch.full((2, 3), -100)), sparse=True)
    assert lists(narrow) == [[], [], [0, 1, 2, 3, 4, 5], []]


def test_every_row():
    some = TokenPartition.from_labels(LABELS)
    every = every_row_dense(some)
    assert lists(every) == [list(range(10)), [], [], LOSS]
    assert every.num_labelled == every_row_dense(every).num_labelled == some.num_labelled == some.num_dense < 10


def test_derived_partitions_are_made_once_a_forward():
    context = SparseContext(TokenPartition.from_labels(LABELS), scale=1.0, loss_only=True)
    assert context.rows_with_loss(False) is context.rows_with_loss(False)
    assert context.every_row_dense() is context.every_row_dense()


def test_few_rows_are_not_worth_it():
    labels = torch.full((1, 800), 5)
    assert not enough_unused_rows(TokenPartition.from_labels(labels))
    labels[:, : int(800 * WORTH_REMOVING)] = -100
    assert enough_unused_rows(TokenPartition.from_labels(labels))


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.config = head, LlamaConfig()

    def get_output_embeddings(self):
        return self.head


class FakeQuantised(nn.Linear):
    """As torchao's, whose forward is more than a product."""


@pytest.fixture
def batch():
    return {"input_ids": LABELS.clamp_min(0), "labels": LABELS, "attention_mask": torch.ones(2, 5)}


def is_fused(model, arguments):
    return loss_is_fused(model, read_batch(arguments))


def test_an_ordinary_training_forward_ends_in_the_fused_loss(batch):
    model = Model(nn.Linear(4, 9))
    assert is_fused(model, batch)
    assert is_fused(model, {"inputs_embeds": torch.zeros(2, 5, 4), "labels": LABELS})
    assert is_fused(model, {**batch, "logits_to_keep": 0, "output_hidden_states": False, "use_cache": True})
    packed = {"position_ids": torch.arange(5).expand(2, 5), "packed_seq_lengths": torch.tensor([5, 5])}
    assert is_fused(model, {**batch, **packed})


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": None},
        {"labels": torch.tensor([1, 2])},
        {"input_ids": None},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"logits_to_keep": 1},
        {"num_logits_to_keep": torch.arange(3)},
        {"past_key_values": ((torch.zeros(1), torch.zeros(1)),)},
        {"shift_labels": LABELS},
        {"fused_lm_head": True},
        {"position_ids": torch.arange(5)},
        {"cu_seq_lens_q": torch.tensor([0, 4, 10])},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_forwards_of_which_more_is_read(batch, changes):
    assert not is_fused(Model(nn.Linear(4, 9)), {**batch, **changes})


def test_a_single_token_has_no_loss():
    assert not is_fused(Model(nn.Linear(4, 9)), {"input_ids": torch.ones(1, 1), "labels": torch.ones(1, 1)})


@pytest.mark.parametrize("name", ["UNSLOTH_RETURN_LOGITS", "UNSLOTH_RETURN_HIDDEN_STATES"])
def test_whoever_asks_unsloth_for_every_row_gets_it(batch, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not is_fused(Model(nn.Linear(4, 9)), batch)


def test_a_configuration_may_ask_for_hidden_states(batch):
    model = Model(nn.Linear(4, 9))
    model.config.output_hidden_states = True
    assert not is_fused(model, batch)


def test_heads(batch):
    assert not is_fused(Model(None), batch)
    assert not is_fused(Model(FakeQuantised(4, 9)), batch)
    wrapped = nn.ModuleDict({"original_module": nn.Linear(4, 9), "modules_to_save": nn.ModuleDict()})
    assert is_fused(Model(wrapped), batch)


@pytest.mark.parametrize(
    ("family", "changes", "skips"),
    [("llama", {}, True), ("granite", {}, True), ("gemma2", {}, False), ("llama", {"exact_removal": False}, False)],
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_skips_its_unused_output(family, changes, skips, reentrant, monkeypatch):
    """The MLP's output, unless a norm follows it; gradients are those without checkpointing."""
    asked, forward = [], _GatedMlpRows.forward

    def watched(self, x, output_unused=False):
        asked.append(output_unused)
        return forward(self, x, output_unused)

    monkeypatch.setattr(_GatedMlpRows, "forward", watched)
    model, batch = make_lora(family), make_batch()
    attach(model, always(mlp={"1-2": 0.6}, self_attn={}, estimator={"kind": "svd", "rank": 4}, **changes))
    expected = loss_and_gradients(model, batch)
    assert not any(asked)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, gradients = loss_and_gradients(model, batch)
    assert any(asked) == (skips and reentrant)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
