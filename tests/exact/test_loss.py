"""The loss over loss positions only, against the whole loss, by a stand-in for Unsloth's own (`installed/loss.py`)."""

import copy
import gc
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact import loss as loss_module
from sparse_unsloth.exact.loss import FUNCTION, MODULES, ROW_MULTIPLE, install_loss_removal
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense

from loss_model import BATCH, HIDDEN, SEQUENCE, Model, assert_same, make_labels, run


class Recorder:
    """A loss with Unsloth's signature and meaning, which notes the shapes that it receives."""

    def __init__(self):
        self.shapes = []

    def function(self):
        def unsloth_fused_ce_loss(
            trainer,
            hidden_states,
            lm_head_weight,
            lm_head_bias,
            labels,
            mask=None,
            n_items=None,
            shift_labels=True,
            **kwargs,
        ):
            self.shapes.append(tuple(hidden_states.shape))
            ignored = kwargs.get("ignore_index", -100)
            if shift_labels:
                labels = F.pad(labels[..., 1:], (0, 1), value=ignored)
                if mask is not None:
                    labels = labels.masked_fill(F.pad(mask[..., 1:], (0, 1)) == 0, ignored)
            logits, labels = hidden_states.reshape(-1, HIDDEN) @ lm_head_weight.t(), labels.reshape(-1)
            total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=ignored)
            return total / max(n_items or int((labels != ignored).sum()), 1)

        return unsloth_fused_ce_loss


@pytest.fixture
def recorder(monkeypatch):
    recorder, function = Recorder(), None
    for name in MODULES:
        module = ModuleType(name)
        function = function or recorder.function()
        setattr(module, FUNCTION, function)
        monkeypatch.setitem(sys.modules, name, module)
    yield recorder
    for removal in list(loss_module._registered):
        removal.remove()
    loss_module._restore_functions()  # where models were dropped without remove()
    assert all(getattr(sys.modules[name], FUNCTION) is function for name in MODULES)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("share", [0, 0.01, 0.2, 1])
@pytest.mark.parametrize("n_items", [None, 77])
def test_same_loss_and_gradients_from_fewer_rows(recorder, module, share, n_items):
    model, labels = Model(module=module), make_labels(share)
    expected = run(model, labels, n_items=n_items)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    assert_same(run(model, labels, n_items=n_items), expected)
    given = {0: (1, 128, HIDDEN), 0.01: (1, 128, HIDDEN), 0.2: (1, 128, HIDDEN), 1: (BATCH, SEQUENCE, HIDDEN)}
    assert recorder.shapes[-1] == given[share]


@pytest.mark.parametrize(
    "call",
    [
        {"shift_labels": False},
        {"mask": torch.ones(BATCH, SEQUENCE).tril()},
        {"ignore_index": 3},
    ],
    ids=lambda call: next(iter(call)),
)
def test_other_calls_pass_unchanged(recorder, call):
    model, labels = Model(), make_labels()
    labels = labels.masked_fill(labels == -100, 3) if "ignore_index" in call else labels
    expected = run(model, labels, **call)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    context = SparseContext(TokenPartition.from_labels(labels), scale=1.0)
    assert_same(run(model, labels, context=context, **call), expected)
    assert recorder.shapes[-1] == (BATCH, SEQUENCE, HIDDEN)
    assert not context.loss_reached


@pytest.mark.parametrize("dense_tokens", ["output", "none"])
def test_a_forward_with_a_partition_needs_no_host_sync(recorder, monkeypatch, dense_tokens):
    model, labels = Model(), make_labels(0.5)
    context = SparseContext(TokenPartition.from_labels(labels, dense_tokens=dense_tokens), scale=1.0)
    expected = run(model, labels)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    with monkeypatch.context() as patch:
        patch.setattr(loss_module, "int", lambda value: pytest.fail("waited for the device"), raising=False)
        ours = run(model, labels, context=context)
    assert_same(ours, expected)
    count = len(context.partition.dense) or len(context.partition.loss)
    assert recorder.shapes[-1] == (1, -(-count // ROW_MULTIPLE) * ROW_MULTIPLE, HIDDEN)
    assert context.loss_reached


@pytest.mark.parametrize("dense_tokens", ["output", "none"])
@pytest.mark.parametrize("documents", [{}, {"position_ids": torch.arange(SEQUENCE) % 10}])
def test_rows_follow_the_labels_that_the_loss_is_given(recorder, dense_tokens, documents):
    """Where the partition separates documents and Unsloth's loss does not, the loss stays as it was."""
    model, labels = Model(), make_labels(0.5)
    partition = TokenPartition.from_labels(labels, dense_tokens=dense_tokens, **documents)
    expected = run(model, labels)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    assert_same(run(model, labels, context=SparseContext(partition, scale=1.0)), expected)
    assert recorder.shapes[-1][0] == 1


def test_a_limit_ends_with_its_forward(recorder):
    """A forward that was interrupted before its loss has no effect on the next one."""
    model, few, many = Model(), make_labels(0.01), make_labels(0.5)
    expected = run(model, many)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1), few, context=SparseContext(TokenPartition.from_labels(few), scale=1.0))
    assert_same(run(model, many), expected)
    assert recorder.shapes[-1] == (1, 256, HIDDEN)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_partition_arrives_in_attached_models(recorder, checkpointing):
    from tiny_models import always, make_batch, make_lora

    model = make_lora()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    attach(model, always())
    state = get_state(model)
    state.handles.append(install_loss_removal(state.model, state.layers[-1].module, CONTEXT_ARGUMENT))
    (removal,) = loss_module._registered
    assert removal.head is model.get_base_model().lm_head.weight
    more_than_labelled = torch.ones(1000, dtype=torch.bool)
    loss = model(**make_batch()).loss
    assert removal.num_rows(more_than_labelled) == ROW_MULTIPLE, "the count of the partition was not used"
    loss.backward()
    model.eval()(**make_batch())
    assert removal.num_rows(more_than_labelled) == 1024, "the count of an earlier forward was used"
    copied = copy.deepcopy(model)
    assert len(loss_module._registered) == 2, "the copy is not registered by itself"
    detach(copied)
    detach(model)
    assert not loss_module._registered


def test_captured_dense_forwards_compute_few_logits_too(recorder):
    """Their rows are all dense, whatever their role was."""
    model, labels = Model(), make_labels(0.05)
    expected = run(model, labels)
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    roles = every_row_dense(TokenPartition.from_labels(labels))
    assert roles.num_dense == BATCH * SEQUENCE > 2 * ROW_MULTIPLE
    assert_same(run(model, labels, context=SparseContext(roles, scale=1.0)), expected)
    assert recorder.shapes[-1] == (1, ROW_MULTIPLE, HIDDEN)


def test_only_models_that_ask(recorder):
    original = getattr(sys.modules[MODULES[0]], FUNCTION)
    first, second, third = Model(1), Model(2), Model(3)
    labels = make_labels()
    removals = [install_loss_removal(model, model.layer, CONTEXT_ARGUMENT) for model in (first, second)]

    def rows_seen():
        for model in (first, second, third):
            run(model, labels)
        return [shape[1] for shape in recorder.shapes[-3:]]

    assert rows_seen() == [128, 128, SEQUENCE]
    removals[0].remove()
    removals[0].remove()
    assert rows_seen() == [SEQUENCE, 128, SEQUENCE]
    assert not first.layer._forward_pre_hooks
    removals[1].remove()
    assert all(getattr(sys.modules[name], FUNCTION) is original for name in MODULES)
    removals.append(install_loss_removal(third, third.layer, CONTEXT_ARGUMENT))
    assert rows_seen() == [SEQUENCE, SEQUENCE, 128]


def test_a_model_that_is_dropped_is_forgotten(recorder):
    model = Model()
    install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    del model
    gc.collect()
    assert not loss_module._registered
    run(Model(), make_labels())
    assert recorder.shapes[-1] == (BATCH, SEQUENCE, HIDDEN)


def test_a_wrapper_of_somebody_else_stays(recorder, monkeypatch):
    model, labels, calls = Model(), make_labels(), []
    removal = install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
    module = sys.modules[MODULES[0]]
    ours = getattr(module, FUNCTION)

    def theirs(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *, shift_labels=True, **kwargs):
        calls.append(labels.shape)
        return ours(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, shift_labels=shift_labels, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, FUNCTION, theirs)
        run(model, labels)
        assert recorder.shapes[-1] == (1, 128, HIDDEN)
        removal.remove()
        assert getattr(module, FUNCTION) is theirs
        run(model, labels)
        assert recorder.shapes[-1] == (BATCH, SEQUENCE, HIDDEN)
        assert len(calls) == 2
    setattr(module, FUNCTION, ours.__wrapped__)  # the patch put ours back


def test_another_unsloth_is_refused(recorder, monkeypatch):
    before = getattr(sys.modules[MODULES[0]], FUNCTION)
    model = Model()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[MODULES[1]], FUNCTION, lambda hidden_states, labels: None)
        with pytest.raises(AttachError, match=r"mistral.unsloth_fused_ce_loss.*exact_removal: false"):
            install_loss_removal(model, model.layer, CONTEXT_ARGUMENT)
        assert getattr(sys.modules[MODULES[0]], FUNCTION) is before
    assert not model.layer._forward_pre_hooks
