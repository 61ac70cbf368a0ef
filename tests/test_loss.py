"""Loss-bearing rows only: against the untouched loss, with Unsloth's own in a subprocess, and with a stand-in of it."""

import copy
import functools
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth import loss as loss_module
from sparse_unsloth.errors import AttachError
from sparse_unsloth.loss import FUNCTION, MODULES, ROW_MULTIPLE, install_loss_removal
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.runtime import CONTEXT_ARGUMENT, SparseContext

HIDDEN, VOCABULARY, BATCH, SEQUENCE = 8, 17, 3, 150


class Recorder:
    """A loss with Unsloth's signature and meaning; keeps the shapes that it was given."""

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


class Model(nn.Module):
    """A last layer that takes keyword arguments, a head, and the call of the loss as Unsloth's forwards write it."""

    def __init__(self, seed=0, module=MODULES[0]):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.head, self.module = Layer(), nn.Linear(HIDDEN, VOCABULARY, bias=False), module

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden_states, labels, context=None, **kwargs):
        hidden_states = self.layer(hidden_states, **{CONTEXT_ARGUMENT: context})
        return getattr(sys.modules[self.module], FUNCTION)(
            trainer=None,
            hidden_states=hidden_states,
            lm_head_weight=self.head.weight,
            lm_head_bias=None,
            labels=labels,
            **{"mask": None, **kwargs},
        )


class Layer(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.fixture
def recorder(monkeypatch):
    recorder, function = Recorder(), None
    for name in MODULES:
        module = ModuleType(name)
        function = function or recorder.function()
        setattr(module, FUNCTION, function)
        monkeypatch.setitem(sys.modules, name, module)
    yield recorder
    for removal in list(loss_module._asking):
        removal.remove()
    loss_module._restore_functions()  # where models were dropped without remove()
    assert all(getattr(sys.modules[name], FUNCTION) is function for name in MODULES)


def make_labels(share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return labels.masked_fill(torch.rand(BATCH, SEQUENCE, generator=generator) >= share, -100)


def run(model, labels, **kwargs):
    """Loss, and the gradients of the hidden states and of the head."""
    hidden_states = torch.randn(*labels.shape, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = model(hidden_states, labels, **kwargs)
    return loss, *torch.autograd.grad(3 * loss, [hidden_states, model.head.weight])


def assert_same(left, right):
    for ours, reference in zip(left, right, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("share", [0, 0.01, 0.2, 1])
@pytest.mark.parametrize("n_items", [None, 77])
def test_same_loss_and_gradients_from_fewer_rows(recorder, module, share, n_items):
    model, labels = Model(module=module), make_labels(share)
    expected = run(model, labels, n_items=n_items)
    install_loss_removal(model, model.layer)
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
    install_loss_removal(model, model.layer)
    context = SparseContext(TokenPartition.from_labels(labels), scale=1.0)
    assert_same(run(model, labels, context=context, **call), expected)
    assert recorder.shapes[-1] == (BATCH, SEQUENCE, HIDDEN)
    assert not context.loss_reached


@pytest.mark.parametrize("dense_tokens", ["output", "none"])
def test_a_forward_with_a_partition_needs_no_host_sync(recorder, monkeypatch, dense_tokens):
    model, labels = Model(), make_labels(0.5)
    context = SparseContext(TokenPartition.from_labels(labels, dense_tokens=dense_tokens), scale=1.0)
    expected = run(model, labels)
    install_loss_removal(model, model.layer)
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
    """Where the partition cuts documents that Unsloth's loss does not, the loss counts what it always counted."""
    model, labels = Model(), make_labels(0.5)
    partition = TokenPartition.from_labels(labels, dense_tokens=dense_tokens, **documents)
    expected = run(model, labels)
    install_loss_removal(model, model.layer)
    assert_same(run(model, labels, context=SparseContext(partition, scale=1.0)), expected)
    assert recorder.shapes[-1][0] == 1


def test_a_limit_ends_with_its_forward(recorder):
    """A forward that was interrupted before its loss leaves nothing behind for the next, whichever way that comes."""
    model, few, many = Model(), make_labels(0.01), make_labels(0.5)
    expected = run(model, many)
    install_loss_removal(model, model.layer)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1), few, context=SparseContext(TokenPartition.from_labels(few), scale=1.0))
    assert_same(run(model, many), expected)
    assert recorder.shapes[-1] == (1, 256, HIDDEN)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_partition_arrives_in_attached_models(recorder, checkpointing):
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny import always, make_batch, make_lora

    model = make_lora()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    attach(model, always())
    state = get_state(model)
    state.handles.append(install_loss_removal(state.model, state.layers[-1].module))
    (removal,) = loss_module._asking
    assert removal.head is model.get_base_model().lm_head.weight
    more_than_labelled = torch.ones(1000, dtype=torch.bool)
    loss = model(**make_batch()).loss
    assert removal.num_rows(more_than_labelled) == ROW_MULTIPLE, "the count of the partition was not used"
    loss.backward()
    model.eval()(**make_batch())
    assert removal.num_rows(more_than_labelled) == 1024, "the count of an earlier forward was used"
    copy.deepcopy(model)
    detach(model)
    assert not loss_module._asking


def test_only_models_that_ask(recorder):
    original = getattr(sys.modules[MODULES[0]], FUNCTION)
    first, second, third = Model(1), Model(2), Model(3)
    labels = make_labels()
    removals = [install_loss_removal(model, model.layer) for model in (first, second)]

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
    removals.append(install_loss_removal(third, third.layer))
    assert rows_seen() == [SEQUENCE, SEQUENCE, 128]


def test_a_model_that_is_dropped_is_forgotten(recorder):
    model = Model()
    install_loss_removal(model, model.layer)
    del model
    gc.collect()
    assert not loss_module._asking
    run(Model(), make_labels())
    assert recorder.shapes[-1] == (BATCH, SEQUENCE, HIDDEN)


def test_a_wrapper_of_somebody_else_stays(recorder, monkeypatch):
    model, labels, calls = Model(), make_labels(), []
    removal = install_loss_removal(model, model.layer)
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
            install_loss_removal(model, model.layer)
        assert getattr(sys.modules[MODULES[0]], FUNCTION) is before
    assert not model.layer._forward_pre_hooks


def test_with_unsloth(tmp_path):
    """Unsloth's own loss and forwards, in a process of its own: importing it changes torch and transformers."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_COMPILE_DISABLE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, __file__]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-6000:]


def compare_with_unsloth():
    """What `test_with_unsloth` runs: the loss alone with every argument, then whole forwards of Unsloth's families."""
    pytest.importorskip("unsloth")
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
            removal = install_loss_removal(model, model.layer)
            assert_same(run(model, labels, **option), expected)
            removal.remove()
            assert rows[-2:] == [
                BATCH * SEQUENCE,
                BATCH * SEQUENCE if name == "all" else 128 if name != "some" else 256,
            ]
            assert (expected[0] == 0) == (name == "none")


def compare_forwards(modules, rows):
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny import make_base

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
        removal = install_loss_removal(model, model.model.layers[-1])
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


if __name__ == "__main__":
    compare_with_unsloth()
