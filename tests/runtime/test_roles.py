"""Forwards without labels: the gradient at the decoder stack's output tells which rows bear loss."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.ops import stored_rows
from sparse_unsloth.runtime import forward
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.partition import TokenPartition, completion_without_loss

import decoder_models
import plain_layers
from exact_models import ALL_ROWS
from masked_models import assert_gradients_close, every_step, masked_gradients, record_selections
from plain_layers import use_plain_layers
from tiny_models import loss_and_gradients, make_batch, make_lora, own_loss, without_labels

KINDS = {"none": None, "non-reentrant": False, "reentrant": True}
WEIGHTS = 1.0, -2.0, 0.0


def checkpoint(model, kind):
    model.gradient_checkpointing_disable()
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
        model.enable_input_require_grads()
    return model.train()


def make_model(**changes):
    """In float64; transformers' eager attention has NaN there for padding on the left."""
    model = make_lora(dtype=torch.float64, **changes)
    model.get_base_model().config._attn_implementation = "sdpa"
    return model


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def own_step(model, batch, **arguments):
    return loss_and_gradients(model, batch, partial(own_loss, **arguments))


def expected_roles(batch, weights=WEIGHTS):
    labels, mask, weights = batch["labels"], batch["attention_mask"], torch.tensor(weights)
    loss = (F.pad(labels[:, 1:], (0, 1), value=-100) != -100) & (weights != 0)[:, None]
    padding = (mask == 0) | (weights == 0)[:, None]
    return [rows.flatten().nonzero().flatten().tolist() for rows in (loss, ~loss & ~padding, padding)]


def roles(partition):
    return [rows.tolist() for rows in (partition.dense, partition.context, partition.padding)]


# -- What is trained --------------------------------------------------------------------------------------------------

MODELS = {
    "llama": lambda: (make_lora(dtype=torch.float64), make_batch()),
    "falcon": lambda: (decoder_models.make_model("falcon"), decoder_models.make_batch("falcon")),
}
"""The second one hands no arguments to its layers."""


@pytest.mark.parametrize("name", MODELS)
def test_an_own_loss_is_exact_with_every_row_and_near_with_a_quarter(name):
    model, batch = MODELS[name]()
    weights = torch.linspace(1, -2, len(batch["labels"])).tolist()
    found = {}
    for config in (None, ALL_ROWS, every_step()):
        if config is not None:
            attach(model, config)
        for kind in KINDS:
            loss, gradients = own_step(checkpoint(model, kind), batch, weights=weights)
            found[kind, config and config["backward_rows"]] = loss, flat(gradients)
        if config is not None:
            detach(model)
    exact_loss, exact = found["none", None]
    for (kind, share), (loss, gradient) in found.items():
        torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=0)
        if share == every_step()["backward_rows"]:
            assert 0.8 < torch.cosine_similarity(gradient, exact, dim=0) < 1 - 1e-6, kind
            torch.testing.assert_close(gradient, found["none", share][1], rtol=1e-10, atol=1e-12)
        else:
            assert (gradient - exact).norm() <= 1e-10 * exact.norm(), (kind, share)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_the_masked_reference(side, monkeypatch):
    model, batch = make_model(), make_batch(side=side)
    loss, context, padding = map(torch.tensor, expected_roles(batch))
    partition = TokenPartition(tuple(batch["labels"].shape), loss, context, padding, loss)
    expected = masked_gradients(model, batch, partition=partition, run=own_step)
    attach(model, every_step())
    contexts = record_selections(model, monkeypatch)
    assert_gradients_close(own_step(model, batch)[1], expected[1])
    assert roles(contexts[0].partition) == expected_roles(batch)
    counts = get_state(model).counts
    assert (counts.context_tokens, counts.dense_tokens, counts.sparse_forwards) == (len(context), len(loss), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_layers_compute_the_chosen_rows_alone(kind, monkeypatch):
    """The reentrant recompute of the last layer begins before the roles are known."""
    use_plain_layers(monkeypatch)
    counts = []

    def post_attention(attention_output, residual, plan):
        counts.append((residual[..., 0].numel(), plan.attention.partition.num_dense, plan.mlp.partition.num_dense))
        return plain_layers.post_attention(attention_output, residual, plan)

    monkeypatch.setattr(stored_rows, "post_attention", post_attention)
    monkeypatch.setattr(stored_rows, "post_attention_of_rows", plain_layers.post_attention_by_rows)
    monkeypatch.setattr(whole_layer, "post_attention_by_rows", stored_rows.post_attention_by_rows)
    model, batch = make_model(use_cache=False), make_batch()
    loss, context, padding = map(torch.tensor, expected_roles(batch))
    partition = TokenPartition(tuple(batch["labels"].shape), loss, context, padding, loss)
    expected = flat(masked_gradients(model, batch, partition=partition, run=own_step)[1])
    attach(checkpoint(model, kind), every_step())
    counts.clear()  # of the probe
    ours = flat(own_step(model, batch)[1])
    assert get_state(model).counts.whole_layers == 3
    assert (ours - expected).norm() <= 1e-6 * expected.norm()
    chosen = len(loss) + -(-len(context) // 4)
    assert {one for one in counts if one[0] != batch["labels"].numel()} == (
        {(chosen,) * 3} if kind != "none" else set()
    )


def test_a_second_backward_pass_has_its_own_roles(monkeypatch):
    model, batch = make_lora(dtype=torch.float64), make_batch()
    attach(model, every_step())
    contexts = record_selections(model, monkeypatch)
    others = 0.0, 0.0, 1.0
    alone = own_step(model, batch, weights=others)[1]
    logits = model(**without_labels(batch)).logits
    logits[:2].square().sum().backward(retain_graph=True)

    def again(model, batch):
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return losses[2].sum()

    assert_gradients_close(loss_and_gradients(model, batch, again)[1], alone)
    assert roles(contexts[-1].partition) == expected_roles(batch, others)


def test_forwards_that_no_backward_follows_are_left_alone(caplog):
    """A reference's log probabilities between a policy's forward and its backward, as in DPO."""
    model, batch = make_lora(), make_batch()
    attach(model, every_step())
    for _ in range(2):
        loss = own_loss(model, batch)
        with torch.no_grad():
            own_loss(model, batch)
        loss.backward()
    model(**batch)
    assert get_state(model).gradients_seen
    assert get_state(model).counts.forwards == 3
    assert caplog.text.count("came without labels") == 1


# -- What it costs ----------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU; `Tensor.tolist` is not dispatched."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_once_in_a_backward_pass(kind, monkeypatch):
    model, batch, waits = checkpoint(make_lora(), kind), make_batch(), Waits()
    attach(model, every_step())
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.found.append("tolist") or original(self))
    loss = own_loss(model, batch)
    waits.found.clear()
    with waits:
        loss.backward()
    assert waits.found == ["tolist"]
    loss = model(**batch).loss
    waits.found.clear()
    with waits:
        loss.backward()
    assert waits.found == []


# -- Where it does not apply ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_on_inner_layers_is_refused(kind):
    model, batch = checkpoint(make_lora(), kind), make_batch()
    attach(model, every_step())
    hidden = model(**without_labels(batch), output_hidden_states=True).hidden_states
    with pytest.raises(SparsityError, match="the loss reads hidden states of inner layers only"):
        hidden[2].square().sum().backward()


def say_heads(model):
    model.mtp = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("prepare", "config", "reason"),
    [
        (say_heads, every_step(), "something that mixes tokens may follow the last decoder layer"),
        (lambda model: None, {"preset": "auto"}, "auto: training forwards come without labels"),
    ],
    ids=["heads", "auto"],
)
def test_it_is_dense_and_says_why(prepare, config, reason, caplog):
    model, batch = make_lora(dtype=torch.float64), make_batch()
    expected = own_step(model, batch)[1]
    prepare(model)
    attach(model, config)
    assert_gradients_close(own_step(model, batch)[1], expected)
    assert get_state(model).counts.sparse_forwards == 0
    assert reason in caplog.text


def test_auto_that_chose_rows_leaves_none_out_without_labels(caplog):
    """Its data have labels, and label smoothing takes them away."""
    model, batch = make_lora(dtype=torch.float64), make_batch()
    expected = own_step(model, batch)[1]
    attach(model, {"preset": "auto"})
    state = get_state(model)
    state.auto.attach_again(state, state.auto.asked.decided(backward_rows=0.25, cuda_graphs=False, memory_budget=None))
    state.auto.decision, state.auto.watch = object(), None
    assert get_state(model).row_sparse
    assert_gradients_close(own_step(model, batch)[1], expected)
    assert "sparsity='auto' leaves out no rows there" in caplog.text


# -- Completions ------------------------------------------------------------------------------------------------------


def completions(lengths=((5, 4), (3, 6), (7, 2))):
    """Prompts padded on the left and completions on the right, as GRPO's; the completions have six places."""
    rows = [make_batch(seed=number, lengths=(one,)) for number, one in enumerate(lengths)]
    width = max(prompt for prompt, _ in lengths)
    pads = [(width - prompt, 6 - answer) for prompt, answer in lengths]
    fill = {"input_ids": 2, "labels": -100, "attention_mask": 0}
    return {
        name: torch.cat([F.pad(row[name], pad, value=value) for row, pad in zip(rows, pads, strict=True)])
        for name, value in fill.items()
    }


def test_the_share_of_completions_without_loss_is_logged():
    model, batch = make_lora(), completions()
    attach(model, every_step())
    for weights in (WEIGHTS, (0.0, 1.0, 0.0)):
        own_loss(model, batch, weights, logits_to_keep=7).backward()
    found = metrics(get_state(model))
    assert found["sparsity/completion_without_loss"] == pytest.approx((2 + 6) / 24)
    assert "sparsity/completion_without_loss" not in metrics(get_state(model))


def test_captured_layers_take_completions_as_labelled(monkeypatch, caplog):
    use_plain_layers(monkeypatch)
    model, batch = make_model(use_cache=False), completions()
    expected = own_step(model, batch, logits_to_keep=7)[1]
    attach(model, {**ALL_ROWS, "cuda_graphs": True})
    state, captured = get_state(model), []
    for _ in range(3):
        ours = own_step(model, batch, logits_to_keep=7)[1]
        captured.append(state.counts.captured_layers)
    assert captured[-1] == 3
    assert (flat(ours) - flat(expected)).norm() <= 1e-6 * flat(expected).norm()  # softmax is in float32
    assert "came without labels" not in caplog.text
    known = forward.roles_of(state, read_batch({**without_labels(batch), "logits_to_keep": 7}))
    assert roles(known)[0] == roles(TokenPartition.from_labels(batch["labels"], batch["attention_mask"]))[0]
    own_step(model, batch)
    assert state.counts.captured_layers == 0
    assert "CUDA graphs need the roles in forward, so it is not captured" in caplog.text


# -- By hand ----------------------------------------------------------------------------------------------------------

GRADIENT = torch.zeros(3, 4, 2)
GRADIENT[0, 2, 1], GRADIENT[0, 3, 0], GRADIENT[2, 1, 0] = -1e-30, torch.nan, torch.inf
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("gradient", "options", "expected"),
    [
        (GRADIENT, {}, ([2, 3, 9], [1, 8], [0, 4, 5, 6, 7, 10, 11])),
        (GRADIENT.flatten(0, 1), {"padding_masked": False}, ([2, 3, 9], [0, 1, 8], [4, 5, 6, 7, 10, 11])),
        (torch.stack((GRADIENT * 0, GRADIENT)), {}, ([2, 3, 9], [1, 8], [0, 4, 5, 6, 7, 10, 11])),
        (torch.zeros(3, 4, 2), {}, ([], [1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 10, 11])),
        (GRADIENT, {"dense_tokens": "none"}, ([], [1, 2, 3, 8, 9], [0, 4, 5, 6, 7, 10, 11])),
    ],
    ids=["padded", "flat, padding on the left is read", "several streams", "no loss", "none dense"],
)
def test_roles_of_a_gradient(gradient, options, expected):
    found = TokenPartition.from_gradient(gradient, (3, 4), MASK, **options)
    assert roles(found) == list(map(list, expected))


def test_completions_are_counted_by_what_predicts_them():
    loss = torch.tensor([1, 2, 6])
    partition = TokenPartition((2, 4), loss, loss[:0], loss[:0], loss)
    assert completion_without_loss(partition, 2, None).tolist() == [1, 4]
    assert completion_without_loss(partition, 2, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])).tolist() == [0, 3]
    assert completion_without_loss(partition, 3, None).tolist() == [3, 6]
