"""What does not hold of the installed Unsloth."""

import copy
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from loss import compare_with_unsloth
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unsloth import FastSparseLanguageModel, attach, calibrate, detach, get_state
from sparse_unsloth.autosparsity.search import Calibration
from sparse_unsloth.backends.unsloth.contract import FUSED_FUNCTIONS, find_unsloth, read_contract
from sparse_unsloth.bench import checks
from sparse_unsloth.bench.methods import EQUAL_TO_PLAIN, sparsity_of
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT

from tiny_models import always, loras, loss_and_gradients, make_base, make_batch, make_lora, pack_nf4
from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels
from unsloth_stand_in import SLOTS, assert_same, decoder_layers, packed_batch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""What Unsloth runs through its fast path."""
COMPARED = ("llama", "mistral", "qwen2")
"""Those whose training step runs here: two attentions, two CausalLM forwards, fused and biased Q, K, V."""
SETTINGS = {
    "preset dense": {"preset": "dense"},
    "nothing dropped": always(mlp={"all": 1e-9}, self_attn={"all": 1e-9}),
    "sparse": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}),
    "last layer dense": always(mlp={"0-1": 0.6}, self_attn={"1": 0.5}),
    "no dense rows": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}, dense_tokens="none"),
    "few rows": {"backward_rows": 0.25},
}


def prepare() -> tuple:
    """Models, and what they compute before Unsloth replaces the forwards of transformers' classes."""
    expected = {family: reference_steps(family) for family in COMPARED}
    prefills = {side: prefill_of(make_lora("llama"), side) for side in ("left", "right")}
    bases = {family: make_base(family) for family in FAMILIES}
    longer = make_base("llama", max_position_embeddings=512)
    weights = {"float32": make_base("llama"), "nf4": pack_nf4(make_base("llama"))}
    calibrated = {name: calibration_of(make_lora(base=copy.deepcopy(base))) for name, base in weights.items()}
    return expected, prefills, bases, longer, weights, calibrated


def examine(prepared: tuple) -> dict[str, str]:
    """What does not hold: a traceback by name."""
    expected, prefills, bases, longer, weights, calibrated = prepared
    found = {"contract": failure_of(check_contract), "functions": failure_of(check_functions)}
    found["loss"] = failure_of(compare_with_unsloth)
    for family, base in bases.items():
        found[f"{family}: forwards"] = failure_of(check_forwards, family, base)
    replace_gpu_kernels()
    for family in COMPARED:
        names = SETTINGS if family == "llama" else ("preset dense", "sparse", "few rows")
        found[f"{family}: training step"] = failure_of(compare_steps, bases[family], expected[family], names)
    found["rows without loss"] = failure_of(check_rows_of_the_last_layer, bases["llama"])
    found["two forwards in flight"] = failure_of(check_two_forwards_in_flight, bases["llama"])
    found["memory budget"] = failure_of(check_memory_budget, bases["llama"])
    for name, base in weights.items():
        found[f"calibration of {name}"] = failure_of(compare_calibrations, base, calibrated[name])
    found["micro-batches of one kind of rows"] = failure_of(check_every_gradient_comes, bases["llama"])
    found["left padding"] = failure_of(check_left_padding, bases["llama"])
    found["sparse prefill"] = failure_of(check_sparse_prefill, bases["llama"], prefills)
    found["life after attaching"] = failure_of(check_life_after_attaching, bases["llama"])
    found["benchmark"] = failure_of(check_benchmark, longer)
    return {name: text for name, text in found.items() if text}


def check_contract() -> None:
    """Everything that is needed is in the sources."""
    missing = [need.what for need, found in read_contract(find_unsloth()).items() if not found]
    assert not missing, missing


def check_functions() -> None:
    """The fused functions take the module and its input, as their replacements do."""
    fast_lora = importlib.import_module("unsloth.kernels.fast_lora")
    for name in FUSED_FUNCTIONS:
        parameters = list(inspect.signature(getattr(fast_lora, name)).parameters)
        assert parameters[:2] == ["self", "X"], f"{name}({', '.join(parameters)})"


def check_forwards(family: str, base: nn.Module) -> None:
    """The forwards of a family call the slots, and pass keyword arguments to the decoder layers."""
    from peft import PeftModelForCausalLM

    module = importlib.import_module(f"unsloth.models.{family}")
    getattr(module, f"Fast{family.capitalize()}Model").pre_patch()
    layer = base.model.layers[0]
    code = inspect.unwrap(type(layer.self_attn).forward).__code__
    for slot in SLOTS:
        assert slot in code.co_consts or slot in code.co_names, f"{code.co_name} does not look {slot} up"
    for part in (PeftModelForCausalLM, type(base), type(base.model), type(layer)):
        assert takes_keywords(part.forward), f"{part.__name__}.forward takes no keyword arguments"


def takes_keywords(function) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())


def failure_of(function, *args) -> str:
    """The traceback of what ``function`` raises, or an empty string."""
    try:
        function(*args)
    except Exception:
        return traceback.format_exc()
    return ""


def reference_steps(family: str) -> dict:
    """Loss and gradients of plain PEFT, and of the PEFT backend in each setting."""
    steps = {"dense": loss_and_gradients(make_lora(family), make_batch())}
    for name, setting in SETTINGS.items():
        model = make_lora(family)
        attach(model, setting)
        steps[name] = loss_and_gradients(model, make_batch())
    return steps


def compare_steps(base: nn.Module, expected: dict, names: Sequence[str]) -> None:
    """Unsloth's steps against `reference_steps`: dense and sparse, padded and packed, checkpointed and not."""
    for checkpointing in (False, True):
        model = fused_by_unsloth(copy.deepcopy(base), checkpointing)
        methods = {name: value for name, value in model.__dict__.items() if callable(value)}
        assert_same(loss_and_gradients(model, make_batch()), expected["dense"])
        for name, removal in itertools.product(names, (True, False)):
            assert attach(model, {**SETTINGS[name], "exact_removal": removal}).backend == "unsloth"
            changed = {name for name in methods if model.__dict__[name] is not methods[name]}
            assert changed <= {"save_pretrained"}, changed
            what = f"{name}, exact removal {removal}, checkpointing {checkpointing}"
            assert_same(loss_and_gradients(model, make_batch()), expected[name], f"{what}, padded")
            assert_same(loss_and_gradients(model, packed_batch()), expected[name], f"{what}, packed")
            assert get_state(model).ran == get_state(model).expected_parts()
            detach(model)
            assert all(model.__dict__[name] is methods[name] for name in methods)
        for layer in decoder_layers(model):
            assert layer.self_attn.apply_o.__name__ == "apply_lora_o"
            assert layer.mlp.forward.__func__.__name__ == "apply_lora_mlp_swiglu"


ALL_OF_THEM = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_rows_of_the_last_layer(base: nn.Module) -> None:
    """The last layer's frozen-weight matmuls run over loss positions only, but over every row for keys and values."""
    model, batch = fused_by_unsloth(copy.deepcopy(base), checkpointing=False), make_batch()
    every, loss = batch["labels"].numel(), int((batch["labels"][:, 1:] != -100).sum())
    whole, removed = dict.fromkeys(ALL_OF_THEM, every), dict.fromkeys(ALL_OF_THEM, loss)
    removed |= {"k_proj": every, "v_proj": every}

    def rows(**changes):
        with LastLayerRows(model) as seen:
            outcome = model(**{**batch, **changes})
        return seen.rows, outcome

    attach(model, {"preset": "dense", "exact_removal": False})
    assert rows()[0] == whole
    expected = rows(output_hidden_states=True)[1].hidden_states
    detach(model)
    report = attach(model, {"preset": "dense"})
    assert report.num_sparse == 0
    assert str(report).endswith(
        "unused rows skipped in: logits and loss, the last layer's MLP, the last layer's queries and O projection"
    )
    with HostSyncs() as syncs:
        assert rows()[0] == removed
    assert syncs.count == 1, syncs.count
    seen, outcome = rows(output_hidden_states=True)
    assert seen == whole
    for ours, theirs in zip(outcome.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert rows(labels=None)[0] == whole
    assert rows(labels=batch["input_ids"])[0] == whole, "too few rows to remove"
    assert rows(packed_seq_lengths=None, position_ids=torch.arange(13).expand(3, -1))[0] == whole
    with model.disable_adapter():
        assert rows()[0] == whole
    model.eval()
    assert rows()[0] == whole
    model.train()
    detach(model)
    attach(model, always(mlp={"0-1": 0.6}, self_attn={"0": 0.5}))
    assert rows()[0] == removed
    detach(model)
    attach(model, always(mlp={"2": 0.6}, self_attn={}))
    assert rows()[0] == removed
    detach(model)
    attach(model, {"preset": "dense"})
    llama, original = sys.modules["unsloth.models.llama"], sys.modules["unsloth.models.llama"].unsloth_fused_ce_loss
    llama.unsloth_fused_ce_loss = original.__wrapped__
    with pytest.raises(SparsityError, match=r"did not end in Unsloth's fused loss.*exact_removal: false"):
        model(**batch)
    llama.unsloth_fused_ce_loss = original
    detach(model)


class LastLayerRows(TorchDispatchMode):
    """The number of rows of each frozen-weight matmul of a model's last layer, by projection."""

    def __init__(self, model: nn.Module):
        super().__init__()
        modules = dict(decoder_layers(model)[-1].named_modules())
        self.names = {
            module.base_layer.weight.data_ptr(): name.rpartition(".")[2]
            for name, module in modules.items()
            if hasattr(module, "base_layer")
        }
        self.rows = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            rows, weight = args[-2:]
            if name := self.names.get(weight.data_ptr()):
                assert name not in self.rows, "multiplied twice"
                self.rows[name] = rows.shape[-2]
        return function(*args, **(kwargs or {}))


class HostSyncs(TorchFunctionMode):
    """How often the host asks for a tensor's value."""

    def __init__(self):
        super().__init__()
        self.count = 0
        names = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero")
        self.methods = {getattr(torch.Tensor, name) for name in names}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.methods
        return function(*args, **(kwargs or {}))


def check_two_forwards_in_flight(base: nn.Module) -> None:
    """Each recompute skips the unused rows of its own forward."""
    model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
    batches = make_batch(), make_batch(seed=1, lengths=((3, 9), (11, 1), (2, 2)))
    expected = [loss_and_gradients(model, batch)[1] for batch in batches]
    attach(model, {"preset": "dense"})
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    ours = {name: parameter.grad for name, parameter in loras(model).items()}
    assert_same((0.0, ours), (0.0, {name: expected[0][name] + expected[1][name] for name in ours}))


def check_memory_budget(base: nn.Module) -> None:
    """A layer that keeps its activations runs once a step, and the gradients are the same."""
    from sparse_unsloth.runtime import checkpoint_planner

    model, batch = fused_by_unsloth(copy.deepcopy(base), checkpointing=True), make_batch()
    attach(model, SETTINGS["sparse"])
    expected = loss_and_gradients(model, batch)
    detach(model)
    attach(model, {**SETTINGS["sparse"], "memory_budget": 2.0})
    state, calls = get_state(model), Counter()
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    state.begin_training("test", max_steps=10)
    state.set_step(0)
    original = checkpoint_planner.allocated
    for room, kept in ((0, 0), (2**29, 3)):
        checkpoint_planner.allocated = lambda device, room=room: 2 * 2**30 - room
        calls.clear()
        assert_same(loss_and_gradients(model, batch), expected, f"{kept} kept")
        assert state.planner.num_kept == kept
        assert set(calls.values()) == {1 if kept else 2}, calls
    checkpoint_planner.allocated = original
    state.end_training()
    assert all(layer.gradient_checkpointing for layer in decoder_layers(model))


def check_every_gradient_comes(base: nn.Module) -> None:
    """DDP waits for the gradient of every adapter, so a rank without loss or context tokens must compute them all."""
    batch = make_batch()
    no_loss = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    no_context = {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}
    for checkpointing in (False, True):
        model = fused_by_unsloth(copy.deepcopy(base), checkpointing)
        for name, setting in SETTINGS.items():
            attach(model, setting)
            for what, rows in (("no loss", no_loss), ("no context", no_context)):
                model.zero_grad(set_to_none=True)
                model(**rows).loss.backward()
                missing = [key for key, parameter in loras(model).items() if parameter.grad is None]
                assert not missing, f"{name}, {what}, checkpointing {checkpointing}: {missing[:3]}"
            detach(model)


def check_left_padding(base: nn.Module) -> None:
    """Unsloth's tokens attend to padding on their left; with nothing dropped, results are the same."""
    model, batch = fused_by_unsloth(copy.deepcopy(base), checkpointing=False), make_batch(side="left")
    expected = loss_and_gradients(model, batch)
    attach(model, SETTINGS["nothing dropped"])
    assert_same(loss_and_gradients(model, batch), expected)


def prefill_of(model: nn.Module, side: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and each layer's keys and values, of a batch's prompts without padding, in a sparse prefill."""
    attach(model, SETTINGS["sparse"])
    FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    batch = make_batch(side=side)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True)
    cache = out.past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers] if hasattr(cache, "layers") else cache
    return out.logits[real], [half.transpose(1, 2)[real] for pair in pairs for half in pair]


def check_sparse_prefill(base: nn.Module, expected: dict) -> None:
    """Unsloth's prefill passes the slots, in `generate` once, and its cache is the PEFT backend's."""
    for side in ("left", "right"):
        model = fused_by_unsloth(copy.deepcopy(base), checkpointing=False)
        logits, cache = prefill_of(model, side)
        torch.testing.assert_close(logits, expected[side][0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(cache, expected[side][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert get_state(model).backend.name == "unsloth"
    state, contexts = get_state(model), []
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: contexts.append(kwargs[CONTEXT_ARGUMENT]), with_kwargs=True
    )
    batch = make_batch(side="left")
    model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=1,
        use_cache=True,
    )
    (context,) = contexts
    assert context.ran == state.expected_parts()
    FastSparseLanguageModel.for_training(model, False)
    fresh = fused_by_unsloth(copy.deepcopy(base), checkpointing=False)
    attach(fresh, SETTINGS["sparse"])
    batch = make_batch()
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(fresh, batch), "after the generation")


def check_life_after_attaching(base: nn.Module) -> None:
    """A copy, another adapter and a second LoRA on the merged model give what they give without sparse paths."""
    batch = make_batch()
    for setting in ({"backward_rows": 0.999}, SETTINGS["nothing dropped"]):
        plain, model = (fused_by_unsloth(copy.deepcopy(base), checkpointing=True) for _ in range(2))
        attach(model, setting)
        assert_same(loss_and_gradients(copy.deepcopy(model), batch), loss_and_gradients(plain, batch), "the copy")
        for each in (plain, model):
            each.add_adapter("other", each.peft_config["default"])
            torch.manual_seed(3)
            for name, parameter in each.named_parameters():
                if "other" in name:
                    parameter.data.normal_(0, 0.05)
            each.set_adapter("other")
        assert_same(loss_and_gradients(model, batch), loss_and_gradients(plain, batch), "another adapter")
        plain, model = (
            fused_by_unsloth(each.merge_and_unload().requires_grad_(False), checkpointing=True)
            for each in (plain, model)
        )
        assert get_state(model) is None
        attach(model, setting)
        assert_same(loss_and_gradients(model, batch), loss_and_gradients(plain, batch), "a second stage")


def check_benchmark(base: nn.Module) -> None:
    """Its equality checks hold under Unsloth, with and without checkpointing, on one model."""
    model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
    for checkpointing in (True, False):
        model = FastSparseLanguageModel.for_training(model, checkpointing)
        assert model.get_base_model().model.gradient_checkpointing is checkpointing
        plain = checks.plain_steps(model)
        assert "from float32's" in checks.check(model, "unsloth-dense", plain)
        for method in EQUAL_TO_PLAIN:
            if method.endswith("-graphs"):
                continue  # they need a GPU
            assert attach(model, sparsity_of(method, 3)).backend == "unsloth"
            get_state(model).begin_training(driver="benchmark", max_steps=100)
            get_state(model).set_step(0)
            assert "from each other" in checks.check(model, method, plain)
            detach(model)


def calibration_of(model: nn.Module) -> Calibration:
    """A calibration with few levels."""
    return calibrate(
        model,
        [make_batch(seed) for seed in range(4)],
        max_loss=0.05,
        config={"estimator": {"rank": 4}},
        mlp_levels=(0.25, 0.75),
        attention_levels=(0.5,),
        progress=False,
    )


def compare_calibrations(base: nn.Module, expected: Calibration) -> None:
    """Sensitivities and recipe equal those of the PEFT backend, and the model is unchanged."""
    model = fused_by_unsloth(base, checkpointing=True)
    before = loss_and_gradients(model, make_batch())
    found = calibration_of(model)
    assert get_state(model) is None
    for part, curve in expected.alone.items():
        for level, measured in curve.items():
            ours, theirs = found.alone[part][level].divergence, measured.divergence
            assert abs(ours - theirs) <= 1e-3 * theirs + 1e-6, f"{part} at {level}: {ours}, {theirs}"
    assert found.chosen.recipe == expected.chosen.recipe
    assert any(map(any, found.chosen.recipe))
    assert_same(loss_and_gradients(model, make_batch()), before, "after the calibration")
