"""Adapter changes after attaching: each step equals plain PEFT's, or the call raises an error."""

import copy
import gc
import io
import logging
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_unsloth
from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
from sparse_unsloth.errors import AttachError, SparsityError
from sparse_unsloth.layer import fast as fast_layer
from sparse_unsloth.layer.fast import FastLayer
from sparse_unsloth.runtime import adapter_changes

from tiny_models import always, make_base, make_batch, make_lora
from unsloth_stand_in import StandIn, slots

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = {
    "rows": {"backward_rows": 0.999, "start_step": 0, "end_step": 1.0},
    "channels": always(mlp={"all": 1e-9}, self_attn={"all": 1e-9}),
    "dense": {"preset": "dense"},
}
"""Settings that leave nothing out of such small models, so that every step is plain PEFT's."""
SPARSE = {kind: EXACT[kind] for kind in ("rows", "channels")}


def lora(**changes):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **changes})


def with_lora(base, **changes):
    from peft import get_peft_model

    torch.manual_seed(5)
    return random(get_peft_model(base, lora(r=8, **changes)), "default").train()


def random(model, adapter):
    """``model`` with a random adapter, which changes its output."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name and "lora_" in name:
                parameter.normal_(0, 0.05)
    return model


def beside(model, **changes):
    """Adds another adapter and activates it."""
    model.add_adapter("other", lora(**changes))
    random(model, "other").set_adapter("other")
    return model


def picklable(model):
    """Makes transformers' attention picklable where the ``kernels`` package is installed, which changes it."""
    for module in model.modules():
        module.__dict__.pop("_kernel_funcs", None)
    return model


def step(model, batch=None):
    """The loss, and every gradient, of one training step from a fixed seed."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**(batch or make_batch())).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def marks(model):
    """Everything that attaching could have left on ``model``."""
    named = [f"{name}.{key}" for name, module in model.named_modules() for key in module.__dict__ if "_spars" in key]
    named += [f"{name}.forward" for name, module in model.named_modules() if "forward" in module.__dict__]
    return named + [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def told(caplog):
    """The package's own warnings, without the one about labels."""
    records = [record for record in caplog.records if record.name == "sparse_unsloth"]
    return [record.message for record in records if "came without labels" not in record.message]


def trainer(model, folder, steps=2):
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in make_batch(seed).items()} for seed in range(4) for i in range(3)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


def adapters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


UNLOADING = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "of the tuner": lambda model: model.base_model.merge_and_unload(safe_merge=True),
    "of the class": lambda model: type(model.base_model).merge_and_unload(model.base_model),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("rows", "merge_and_unload"), ("channels", "unload"), ("dense", "of the tuner"), ("rows", "of the class"),
        ("channels", "of the tuner"), ("dense", "merge_and_unload"),
    ],
)  # fmt: skip
def test_a_second_stage_trains_as_without_a_first_attachment(kind, how):
    plain, model = make_lora(), make_lora()
    attach(model, EXACT[kind])
    assert_same(step(model), step(plain))
    plain, model = with_lora(UNLOADING[how](plain)), with_lora(UNLOADING[how](model))
    for then in EXACT:
        attach(model, EXACT[then])
        assert_same(step(model), step(plain))
        detach(model)
    assert marks(model) == marks(plain)


@pytest.mark.parametrize("kind", EXACT)
def test_what_peft_returns_is_a_plain_model_and_the_state_is_freed(kind, tmp_path):
    plain, model = make_lora(), make_lora()
    attach(model, EXACT[kind])
    trainer(model, tmp_path).train()
    trainer(plain, tmp_path).train()
    state, factor = weakref.ref(get_state(model)), weakref.ref(model.get_base_model().model.layers[0].mlp.gate_proj)
    base, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert get_state(model) is None
    detach(model)  # nothing to do, and no error: scripts call it there
    del model
    gc.collect()
    assert state() is None
    assert factor() is None
    assert marks(base) == marks(expected) == []
    loaded = pickle.loads(pickle.dumps(picklable(base)))
    for each in (base, loaded, expected):
        each.requires_grad_(True)
    assert_same(step(base), step(expected))
    assert_same(step(loaded), step(expected))


@pytest.mark.parametrize("kind", SPARSE)
def test_two_stages_with_trainers(kind, tmp_path):
    trained = []
    for attached in (False, True):
        model = make_lora()
        for _ in range(2):
            if attached:
                attach(model, {**EXACT[kind], "start_step": 0.25})
            for _ in range(2):
                torch.manual_seed(0)
                trainer(model, tmp_path).train()
            trained.append(adapters(model))
            model = with_lora(model.merge_and_unload())
    for ours, expected in zip(trained[2:], trained[:2], strict=True):
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-5)


LATER = {  # what attaching would refuse: by kind, what the warning says, "" where it is computed
    "dropout": (lambda m: beside(m, lora_dropout=0.3), "drops out 0.3", "lora_dropout=0.3"),
    "DoRA": (lambda m: beside(m, use_dora=True), "", "uses DoRA"),
    "LoRA bias": (lambda m: beside(m, lora_bias=True), "", "has a LoRA bias"),
    "unfrozen base": (lambda m: m.requires_grad_(True), "", "is trainable"),
    "more modules": (lambda m: beside(m, target_modules=[*ALL, "embed_tokens"]), "", ""),
    "replaced": (lambda m: replaced(m), "projections were replaced", "projections were replaced"),
    "merged": (lambda m: with_head(m, m.merge_adapter()), "merged or disabled", "merged or disabled"),
    "disabled": (lambda m: with_head(m, m.base_model.disable_adapter_layers()), "or disabled", "or disabled"),
    "several active": (lambda m: beside(m).base_model.set_adapter(["default", "other"]) or m, "", "several adapters"),
}


def with_head(model, _):
    """Trains the head too, so that some tensor is always trained."""
    model.get_base_model().lm_head.requires_grad_(True)
    return model


def replaced(model):
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj = layer.mlp.up_proj.get_base_layer()
        layer.self_attn.o_proj = copy.deepcopy(layer.self_attn.o_proj)
    return model


@pytest.mark.parametrize("kind", SPARSE)
def test_adapters_that_change_are_computed_as_peft_does_or_left_to_it_by_name(kind, caplog):
    caplog.set_level(logging.WARNING, "sparse_unsloth")
    for name, (change, *messages) in LATER.items():
        caplog.clear()
        plain, model = change(make_lora()), make_lora()
        attach(model, EXACT[kind])
        step(model)
        assert not told(caplog)
        model = change(model)
        assert_same(step(model), step(plain))
        expected = messages[list(SPARSE).index(kind)]
        assert any(expected in message for message in told(caplog)) if expected else not told(caplog), name
        if kind == "channels" and name == "DoRA":  # and sparse again with the adapter of before
            for each in (plain, model):
                each.set_adapter("default")
            before = get_state(model).counts.sparse_forwards
            assert_same(step(model), step(plain))
            assert get_state(model).counts.sparse_forwards == before + 1


def test_an_inactive_adapter_hinders_nothing():
    for kind in SPARSE:
        plain, model = make_lora(), make_lora()
        for each in (plain, model):
            each.add_adapter("other", lora(lora_dropout=0.5))
        attach(model, EXACT[kind])
        assert_same(step(model), step(plain))
        assert get_state(model).ran == get_state(model).expected_parts()


@pytest.mark.parametrize("kind", SPARSE)
def test_adapters_that_are_switched_in_each_step_are_checked_once(kind, monkeypatch):
    plain, model = make_lora(), make_lora()
    for each in (plain, model):
        beside(each).set_adapter("default")
    attach(model, EXACT[kind])
    checked = []
    for function in ("_watch_adapters", "_problem"):
        own = getattr(adapter_changes, function)
        monkeypatch.setattr(adapter_changes, function, lambda state, own=own: checked.append(own) or own(state))
    for _ in range(3):
        for each in ("default", "other"):
            model.set_adapter(each)
            plain.set_adapter(each)
            assert_same(step(model), step(plain))
        with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(model(**make_batch()).loss, plain(**make_batch()).loss)
    assert len(checked) == 4  # the other adapter and none, once each
    assert len(get_state(model).known_adapters) == 3


def test_replaced_weights_are_not_kept_alive():
    model = make_lora()
    attach(model, EXACT["rows"])
    layer = get_state(model).layers[0]
    fast, base, old = FastLayer(layer), layer.self_attn.q_proj.get_base_layer(), []
    for number in range(5):
        step(model)
        read = fast.projections(number)
        assert read is fast.projections(number)
        assert read[0].base.weight is base.weight
        old.append(weakref.ref(base.weight))
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)  # as FSDP does
        del read
    step(model), fast.projections(5)
    gc.collect()
    assert [one() for one in old[1:]] == [None] * 4  # the first is that of attaching: the layer's spec has it


def test_a_layer_reads_each_adapter_once(monkeypatch):
    model = make_lora()
    beside(model).set_adapter("default")
    attach(model, EXACT["rows"])
    fast, read = FastLayer(get_state(model).layers[0]), []
    own = fast_layer.read_projection
    monkeypatch.setattr(fast_layer, "read_projection", lambda module: read.append(module) or own(module))
    for version in (1, 2, 1, 2, None, 3):
        name = "other" if version == 2 else "default"
        model.set_adapter(name)
        found = fast.projections(version)
        module = get_state(model).layers[0].mlp.up_proj
        assert found[5].lora.A is module.lora_A[name].weight
        assert found[5].lora.scale == module.scaling[name]
    assert len(read) == 14  # seven of each
    fast._projections[5].scaling["default"] = 9.0
    assert fast.projections(3)[5].lora.scale == 9.0


def test_a_trainer_takes_adapters_that_the_sparse_functions_do_not_compute(tmp_path):
    found = []
    for attached in (False, True):
        model = make_lora()
        if attached:
            attach(model, EXACT["channels"])
        beside(model).base_model.set_adapter(["default", "other"])
        torch.manual_seed(0)
        trainer(model, tmp_path).train()
        found.append(adapters(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", EXACT)
def test_peft_does_not_wrap_an_attached_model_again(kind, tmp_path):
    from peft import PeftModel, get_peft_model

    model = make_lora()
    model.save_pretrained(tmp_path)
    attach(model, EXACT[kind])
    names = [name for name, _ in model.named_parameters()]
    for wrap in (
        lambda: get_peft_model(model, lora()),
        lambda: get_peft_model(model.get_base_model(), lora()),
        lambda: PeftModel.from_pretrained(model, tmp_path, is_trainable=True),
        lambda: get_peft_model(model, lora(), mixed=True),
    ):
        with pytest.raises(AttachError, match=r"call detach\(model\), then add them, then attach the model that PEFT"):
            wrap()
    for other in (model.get_base_model(), nn.ModuleList([model])):
        with pytest.raises(AttachError, match="attached already, as those of a PeftModelForCausalLM"):
            attach(other, EXACT[kind])
    assert [name for name, _ in model.named_parameters()] == names
    assert_same(step(model), step(make_lora()))
    detach(model)
    attach(get_peft_model(model, lora(), "second"), "rows")


def test_peft_does_not_wrap_an_attached_base():
    from peft import get_peft_model

    base, plain = make_base().train(), make_base().train()
    attach(base, EXACT["rows"])
    with pytest.raises(AttachError, match="attach last"):
        get_peft_model(base, lora())
    with pytest.raises(AttachError, match="attach last"):
        base.add_adapter(lora())
    assert_same(step(base), step(plain))


@pytest.mark.parametrize("criterion", ["estimator", "magnitude", "random"])
def test_a_stored_channel_model_goes_on(criterion):
    check_stored(always(criterion=criterion, explain_steps=1))


@pytest.mark.parametrize("kind", ["rows", "dense"])
def test_a_stored_model_goes_on(kind):
    check_stored({**EXACT[kind], "backward_rows": 0.25} if kind == "rows" else EXACT[kind])


def check_stored(config):
    """``torch.save`` and ``pickle`` keep the sparse model without its driver; a loaded model is independent."""
    model = picklable(make_lora())
    attach(model, config)
    state = get_state(model)
    state.begin_training(lambda: None, max_steps=10)  # a driver that cannot be pickled
    for number in range(3):
        state.set_step(number)
        step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert get_state(loaded).model is loaded
        assert get_state(loaded).driver is None
        state.end_training()
        assert_same(step(loaded), step(copy.deepcopy(model)))
        assert get_state(loaded).ran == get_state(loaded).expected_parts()
        detach(loaded)
        assert not marks(loaded)
        assert_same(step(loaded), step(make_lora()))


def test_a_stored_model_trains_and_prefills(tmp_path):
    model = picklable(make_lora())
    attach(model, always(start_step=0.25))
    trainer(pickle.loads(pickle.dumps(model)), tmp_path).train()  # a trainer drives it
    FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    loaded, batch = pickle.loads(pickle.dumps(model)), make_batch()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert not marks(loaded.merge_and_unload())


@pytest.mark.parametrize("kind", SPARSE)
def test_a_forward_past_the_attached_model_is_told(kind, caplog):
    caplog.set_level(logging.WARNING, "sparse_unsloth")
    plain, model = make_lora(), make_lora()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model, EXACT[kind])
    without = {key: value for key, value in make_batch().items() if key != "labels"}
    model(**without).logits.sum().backward()  # dense, and its recompute too
    model.eval()(**without)
    model.train()
    assert not told(caplog)
    assert_same(step(model.get_base_model()), step(plain.get_base_model()))
    model.forward(**make_batch())
    (message,) = told(caplog)
    assert "not through the attached PeftModelForCausalLM" in message


def test_moved_models():
    for config in EXACT.values():
        plain, model = make_lora(num_hidden_layers=1), make_lora(num_hidden_layers=1)
        attach(model, config)
        for move in (nn.Module.double, nn.Module.half, nn.Module.float, nn.Module.cpu):
            move(model), move(plain)
            if move is not nn.Module.half:
                assert_same(step(model), step(plain))
        meta = {key: value.to("meta") for key, value in make_batch().items()}
        assert model.to("meta")(**meta).loss.is_meta


def test_torch_compile_leaves_the_sparse_functions_alone():
    plain, model, compiled = make_lora(num_hidden_layers=1), make_lora(num_hidden_layers=1), []
    attach(model, EXACT["channels"])

    def backend(graph, inputs):
        compiled.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    model.compile(backend=backend)
    assert_same(step(model), step(plain))
    torch.compiler.reset()
    assert compiled
    assert not [trace for trace in compiled if str(Path(sparse_unsloth.__file__).parent) in trace]


@pytest.mark.parametrize("config", [EXACT["rows"], always(mlp={"0-1": 1e-9}, self_attn={"0": 1e-9})])
def test_unloading_gives_unsloth_its_functions_back(monkeypatch, config):
    stand_in = StandIn(monkeypatch)
    plain, model = stand_in.model(), stand_in.model()
    before = slots(model)
    assert attach(model, {**config, "exact_removal": False}).backend == "unsloth"
    assert_same(step(model), step(plain))
    later = [beside(copy.deepcopy(each), lora_dropout=0.3) for each in (model, plain)]
    assert_same(*map(step, later))
    base = model.merge_and_unload()
    assert slots(model) == before
    assert not [mark for mark in marks(base) if not mark.endswith(".forward")]


def test_a_second_stage_on_text_without_context_needs_no_driver():
    plain, model = make_lora(), make_lora()
    attach(model, {"mlp": {"all": 0.5}, "estimator": {"kind": "svd"}})  # with a schedule
    plain, model = with_lora(plain.merge_and_unload()), with_lora(model.merge_and_unload())
    attach(model, {"mlp": {"all": 0.5}, "estimator": {"kind": "svd"}})
    ids = make_batch()["input_ids"]
    assert_same(step(model, {"input_ids": ids, "labels": ids}), step(plain, {"input_ids": ids, "labels": ids}))
    with pytest.raises(SparsityError, match="nothing drives it"):
        model(**make_batch())
