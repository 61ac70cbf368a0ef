"""What the Unsloth backend needs of Unsloth: of the installed release, and of stand-ins that break one thing each.

The installed release runs on the CPU, in a process of its own (this file as a script): importing Unsloth changes torch
and transformers for good. Its norm, RoPE and gated unit have GPU kernels only and are replaced there by the same
mathematics in PyTorch; everything else is Unsloth's own code.
"""

import copy
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

from sparse_unsloth import FastSparseLanguageModel, attach, calibrate, detach, get_state
from sparse_unsloth.autosparsity.search import Calibration
from sparse_unsloth.backends import unsloth as backend
from sparse_unsloth.bench import checks
from sparse_unsloth.bench.methods import EQUAL_TO_PLAIN, sparsity_of
from sparse_unsloth.errors import AttachError, SparsityError

sys.path.insert(0, str(Path(__file__).parent))
from tiny import always, loras, loss_and_gradients, make_base, make_batch, make_lora, pack_nf4

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""What Unsloth runs through its fast path."""
COMPARED = ("llama", "mistral", "qwen2")
"""Those whose training step runs here: two attentions, two CausalLM forwards, fused and biased Q, K, V."""
SLOTS = ("apply_qkv", "apply_o")
FUNCTIONS = (*backend.FUSED_MLPS, "apply_lora_qkv", "apply_lora_o")
SETTINGS = {
    "preset dense": {"preset": "dense"},
    "nothing dropped": always(mlp={"all": 1e-9}, self_attn={"all": 1e-9}),
    "sparse": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}),
    "last layer dense": always(mlp={"0-1": 0.6}, self_attn={"1": 0.5}),
    "no dense rows": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}, dense_tokens="none"),
    "tiers": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}, output_sparsity=0.4),
    "tiers below": always(mlp={"0-1": 0.6}, self_attn={"1": 0.5}, output_sparsity=0.4),
}


def assert_same(ours, expected, what=""):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, f"{what} {name}"


def decoder_layers(model):
    return model.get_base_model().model.layers


# The installed release


def test_the_installed_release(tmp_path):
    """One test, since Unsloth takes long to import: each entry of ``problems`` names what does not hold any more."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
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
    command = [sys.executable, __file__, str(tmp_path / "problems.json")]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    problems = json.loads((tmp_path / "problems.json").read_text())
    assert problems == {}, "\n\n".join(f"{name}: {text}" for name, text in problems.items())


def examine() -> dict[str, str]:
    """What does not hold of the installed Unsloth: a name and a traceback each."""
    torch.set_num_threads(1)
    # Unsloth replaces the forwards of transformers' classes, so the reference comes first.
    expected = {family: reference_steps(family) for family in COMPARED}
    bases = {family: make_base(family) for family in FAMILIES}
    longer = make_base("llama", max_position_embeddings=512)
    weights = {"float32": make_base("llama"), "nf4": pack_nf4(make_base("llama"))}
    calibrated = {name: calibration_of(make_lora(base=copy.deepcopy(base))) for name, base in weights.items()}

    import unsloth  # noqa: F401

    found = {"contract": failure_of(backend.Contract), "functions": failure_of(check_functions)}
    for family, base in bases.items():
        found[f"{family}: forwards"] = failure_of(check_forwards, family, base)
    replace_gpu_kernels()
    for family in COMPARED:
        found[f"{family}: training step"] = failure_of(compare_steps, bases[family], expected[family])
    found["rows without loss"] = failure_of(check_rows_of_the_last_layer, bases["llama"])
    found["two forwards in flight"] = failure_of(check_two_forwards_in_flight, bases["llama"])
    found["memory budget"] = failure_of(check_memory_budget, bases["llama"])
    for name, base in weights.items():
        found[f"calibration of {name}"] = failure_of(compare_calibrations, base, calibrated[name])
    found["micro-batches of one kind of rows"] = failure_of(check_every_gradient_comes, bases["llama"])
    found["left padding"] = failure_of(check_left_padding, bases["llama"])
    found["benchmark"] = failure_of(check_benchmark, longer)
    return {name: text for name, text in found.items() if text}


def check_functions() -> None:
    """The fused functions take the module and its input, as their replacements do."""
    fast_lora = importlib.import_module("unsloth.kernels.fast_lora")
    for name in FUNCTIONS:
        parameters = list(inspect.signature(getattr(fast_lora, name)).parameters)
        assert parameters[:2] == ["self", "X"], f"{name}({', '.join(parameters)})"


def check_forwards(family: str, base: nn.Module) -> None:
    """The forwards of a family look the slots up, and hand keyword arguments on to the decoder layers."""
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


def compare_steps(base: nn.Module, expected: dict) -> None:
    """Unsloth's steps against `reference_steps`: dense and sparse, padded and packed, checkpointed and not."""
    for checkpointing in (False, True):
        model = fused_by_unsloth(copy.deepcopy(base), checkpointing)
        methods = {name: value for name, value in model.__dict__.items() if callable(value)}
        assert_same(loss_and_gradients(model, make_batch()), expected["dense"])
        for name, removal in itertools.product(SETTINGS, (True, False)):
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
    """Rows that its base weights are multiplied with: those that bear loss, but every row for keys and values."""
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
        "rows without loss: left out of logits and loss, the last layer's MLP, the last layer's queries and O "
        "projection"
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
    """Rows of the products with the base weights of a model's last layer, by projection."""

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
    """Each recompute leaves out the rows of its own forward."""
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
    from sparse_unsloth import memory_budget

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
    original = memory_budget.allocated
    for room, kept in ((0, 0), (2**29, 3)):
        memory_budget.allocated = lambda device, room=room: 2 * 2**30 - room
        calls.clear()
        assert_same(loss_and_gradients(model, batch), expected, f"{kept} kept")
        assert state.planner.num_kept == kept
        assert set(calls.values()) == {1 if kept else 2}, calls
    memory_budget.allocated = original
    state.end_training()
    assert all(layer.gradient_checkpointing for layer in decoder_layers(model))


def check_every_gradient_comes(base: nn.Module) -> None:
    """DDP waits for the gradient of every adapter, so a rank without dense or context rows must bring them all."""
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
    """Unsloth's tokens attend to padding on their left: with nothing dropped that is what they find there."""
    model, batch = fused_by_unsloth(copy.deepcopy(base), checkpointing=False), make_batch(side="left")
    expected = loss_and_gradients(model, batch)
    attach(model, SETTINGS["nothing dropped"])
    assert_same(loss_and_gradients(model, batch), expected)


def check_benchmark(base: nn.Module) -> None:
    """Its equality checks hold under Unsloth, with and without checkpointing, on one model."""
    model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
    for checkpointing in (True, False):
        model = FastSparseLanguageModel.for_training(model, checkpointing)
        assert model.get_base_model().model.gradient_checkpointing is checkpointing
        plain = checks.plain_steps(model)
        assert "from float32's" in checks.check(model, "unsloth-dense", plain)
        for method in EQUAL_TO_PLAIN:
            assert attach(model, sparsity_of(method, 3)).backend == "unsloth"
            get_state(model).begin_training(driver="benchmark", max_steps=100)
            get_state(model).set_step(0)
            assert "from each other" in checks.check(model, method, plain)
            detach(model)


def calibration_of(model: nn.Module) -> Calibration:
    """With few levels; output tokens are candidates too."""
    return calibrate(
        model,
        [make_batch(seed) for seed in range(4)],
        max_loss=0.05,
        config={"estimator": {"rank": 4}},
        mlp_levels=(0.25, 0.75),
        attention_levels=(0.5,),
        output_levels=(0.25,),
        progress=False,
    )


def compare_calibrations(base: nn.Module, expected: Calibration) -> None:
    """The same sensitivities and recipe as with the PEFT backend, and a model that is as it was."""
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


def packed_batch():
    """`make_batch` without padding, as TRL under Unsloth sends it: one row, and the documents' lengths."""
    padded = make_batch()
    keep = padded["attention_mask"].bool()
    lengths = keep.sum(1)
    return {
        "input_ids": padded["input_ids"][keep][None],
        "labels": padded["labels"][keep][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "packed_seq_lengths": lengths.int(),
    }


def fused_by_unsloth(base: nn.Module, checkpointing: bool) -> nn.Module:
    """A LoRA model of ``base`` as Unsloth's ``get_peft_model`` leaves it, in float32."""
    from unsloth.models import llama

    base.model.rotary_emb = rotary = Rotary(base.model.rotary_emb, base.config.max_position_embeddings)
    for layer in base.model.layers:
        layer.self_attn.rotary_emb = rotary
        layer.self_attn.apply_qkv, layer.self_attn.apply_o = llama.original_apply_qkv, llama.original_apply_o
    model = make_lora(base=base)
    model.max_seq_length = base.config.max_position_embeddings
    return llama.FastLlamaModel.patch_peft_model(model, use_gradient_checkpointing=checkpointing).train()


class Rotary(nn.Module):
    """Cosines and sines ``[positions, head_dim]`` of transformers, handed out as Unsloth's rotary embedding does."""

    def __init__(self, rotary: nn.Module, length: int):
        super().__init__()
        self.tables = tuple(table[0] for table in rotary(torch.zeros(1), torch.arange(length)[None]))

    def extend_rope_embedding(self, *args, **kwargs):
        pass

    def get_cached(self, *args, **kwargs):
        return self.tables


def replace_gpu_kernels() -> None:
    """Unsloth's Triton kernels by the same mathematics, and what it does only when it loads a model itself."""
    import bitsandbytes
    from transformers import Trainer
    from unsloth.kernels import fast_lora, swiglu, utils
    from unsloth.models import llama, mistral

    def rms_norm(norm, x, gemma=False, **kwargs):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    def rope(q, k, cos, sin, positions=None):
        positions = torch.arange(q.shape[2])[None] if positions is None else positions.long()
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        return tuple(x * cos + modeling_llama.rotate_half(x) * sin for x in (q, k))

    def dequantize(weight, quant_state=None, out=None, use_global_buffer=False, dtype=None):
        whole = weight if quant_state is None else bitsandbytes.functional.dequantize_4bit(weight, quant_state)
        return whole if dtype is None else whole.to(dtype)

    for module in (fast_lora, utils):
        module.fast_dequantize = dequantize
    llama.fast_rms_layernorm = rms_norm
    llama.fast_rope_embedding = mistral.fast_rope_embedding = rope
    fast_lora.swiglu_fg_kernel = lambda e, g: F.silu(e) * g
    fast_lora.swiglu_DWf_DW_dfg_kernel = swiglu._DWf_DW_dfg_traced
    # It fuses nothing over float32, which makes results exact here.
    llama._base_weight_dtype = lambda projection: torch.bfloat16

    def _fast_inner_training_loop(*args, **kwargs):
        raise NotImplementedError("The trainer is not part of this.")

    Trainer._inner_training_loop = _fast_inner_training_loop


# Stand-ins for it


def original_apply_qkv(self, X):
    return self.q_proj(X), self.k_proj(X), self.v_proj(X)


def original_apply_o(self, X):
    return self.o_proj(X)


def fused_loss(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, mask=None, shift_labels=True):
    raise NotImplementedError


class SlotAttention(modeling_llama.LlamaAttention):
    """Llama's attention, with its projections behind the two slots."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        projected = getattr(self, "apply_qkv", original_apply_qkv)(self, hidden_states)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        mixed, _ = modeling_llama.eager_attention_forward(self, q, k, v, attention_mask, self.scaling)
        return getattr(self, "apply_o", original_apply_o)(self, mixed.flatten(2)), None


class DeafAttention(SlotAttention):
    """An attention that does not look the slots up any more."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


class StandIn:
    """Modules under Unsloth's names whose fused functions compute what PEFT does and note their calls."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.fast_lora, self.llama = ModuleType("fast_lora"), ModuleType("unsloth.models.llama")
        for name in FUNCTIONS:
            setattr(self.fast_lora, name, self._function(name))
        self.llama.original_apply_qkv, self.llama.original_apply_o = original_apply_qkv, original_apply_o
        self.mistral = ModuleType("unsloth.models.mistral")
        self.llama.unsloth_fused_ce_loss = self.mistral.unsloth_fused_ce_loss = fused_loss
        packages = {name: ModuleType(name) for name in ("unsloth", "unsloth.kernels", "unsloth.models")}
        packages["unsloth.kernels"].fast_lora = self.fast_lora
        packages["unsloth.models"].llama = self.llama
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", self.fast_lora)
        monkeypatch.setitem(sys.modules, "unsloth.models.llama", self.llama)
        monkeypatch.setitem(sys.modules, "unsloth.models.mistral", self.mistral)

    def _function(self, name):
        def fused(module, X):
            self.calls.append(name)
            if name == "apply_lora_qkv":
                return original_apply_qkv(module, X)
            if name == "apply_lora_o":
                return original_apply_o(module, X)
            return module.down_proj(module.act_fn(module.gate_proj(X)) * module.up_proj(X))

        return fused

    def model(self, fused=(0, 1, 2)):
        """`tiny`'s Llama with its functions fused in some layers, as Unsloth leaves it."""
        model = make_lora("llama")
        for index, layer in enumerate(decoder_layers(model)):
            attention = layer.self_attn
            attention.__class__ = SlotAttention
            attention.apply_qkv, attention.apply_o = original_apply_qkv, original_apply_o
            if index in fused:
                layer.mlp.forward = MethodType(self.fast_lora.apply_lora_mlp_swiglu, layer.mlp)
                attention.apply_qkv, attention.apply_o = self.fast_lora.apply_lora_qkv, self.fast_lora.apply_lora_o
        return model

    def called(self):
        """The calls since the last question, sorted."""
        calls, self.calls = sorted(self.calls), []
        return calls


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


def slots(model):
    """What stands in the replaceable places of each layer."""
    return [
        {
            "mlp": layer.mlp.__dict__.get("forward"),
            "tiled": layer.mlp.__dict__.get("_unsloth_forward"),
            **{name: layer.self_attn.__dict__.get(name) for name in SLOTS},
        }
        for layer in decoder_layers(model)
    ]


def setting(**changes):
    return always(exact_removal=False, **changes)


ONE_STEP = sorted(["apply_lora_mlp_swiglu", "apply_lora_o", "apply_lora_qkv"] * 3)


def test_sparse_paths_take_the_place_of_the_fused_functions(stand_in):
    model, peft = stand_in.model(), make_lora("llama")
    rules = {"mlp": {"1-2": 0.6}, "self_attn": {"2": 0.5}}
    before = slots(model)
    assert attach(model, setting(**rules)).backend == "unsloth"
    assert attach(peft, setting(**rules)).backend == "peft"
    stand_in.called()
    assert_same(loss_and_gradients(model, make_batch()), loss_and_gradients(peft, make_batch()))
    assert stand_in.called() == ["apply_lora_mlp_swiglu", *["apply_lora_o"] * 2, *["apply_lora_qkv"] * 2]
    after = slots(model)
    assert after[0] == before[0]
    assert after[1]["mlp"] != before[1]["mlp"]
    assert after[1]["apply_qkv"] is before[1]["apply_qkv"]
    assert all(after[2][name] is not before[2][name] for name in ("mlp", *SLOTS))
    assert all(backend.is_installed(module) for module in get_state(model).hooked)
    assert len(get_state(model).hooked) == 3
    detach(model)
    assert slots(model) == before
    loss_and_gradients(model, make_batch())
    assert stand_in.called() == ONE_STEP


@pytest.mark.parametrize("how", ["evaluation", "no labels", "no context", "disabled", "merged", "two adapters"])
def test_the_fused_functions_run_where_sparsity_does_not_apply(stand_in, how):
    model, batch = stand_in.model(), make_batch()
    attach(model, setting())
    if how == "evaluation":
        model.eval()
    elif how == "no labels":
        del batch["labels"]
    elif how == "merged":
        model.merge_adapter()
    elif how == "two adapters":
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    elif how == "no context":
        batch["labels"] = batch["input_ids"]
    stand_in.called()
    if how == "disabled":
        with model.disable_adapter():
            model(**batch)
    else:
        model(**batch)
    assert stand_in.called() == ONE_STEP


def test_unfused_biased_projections_are_replaced_too(stand_in):
    model = stand_in.model()
    for layer in decoder_layers(model):
        layer.self_attn.apply_qkv = original_apply_qkv
    attach(model, setting())
    stand_in.called()
    loss_and_gradients(model, make_batch())
    assert stand_in.called() == []
    assert get_state(model).ran == get_state(model).expected_parts()


def test_a_tiled_mlp_is_replaced_as_a_whole(stand_in):
    model, calls = stand_in.model(), []

    def tiled(self, X):
        calls.append(X.shape)
        return self._unsloth_forward(X)

    for layer in decoder_layers(model):
        layer.mlp._unsloth_forward, layer.mlp.forward = layer.mlp.forward, MethodType(tiled, layer.mlp)
    before = slots(model)
    attach(model, setting())
    del calls[:]
    loss_and_gradients(model, make_batch())
    assert calls == []
    model.eval()(**make_batch())
    assert len(calls) == 3
    detach(model)
    assert slots(model) == before


@pytest.mark.parametrize("sparsity", [{"preset": "dense"}, {"mlp": {"2": 0.6}}, {"mlp": {"0": 0.6}}], ids=str)
def test_the_last_layer_is_hooked_for_exact_removal(stand_in, sparsity):
    model = stand_in.model()
    before = slots(model)
    report = attach(model, always(**{"mlp": {}, "self_attn": {}, **sparsity}))
    state, last = get_state(model), decoder_layers(model)[2]
    assert report.exact_removal.startswith("logits and loss, the last layer's MLP, the last layer's queries")
    assert report.layers[2].self_attn == 0
    assert report.num_sparse == len(state.runtimes) == len(state.expected_parts()) == len(sparsity.get("mlp", {}))
    assert state.hooked_parts() == state.expected_parts() | {(2, "mlp"), (2, "self_attn")}
    assert {last.mlp, last.self_attn} <= set(state.hooked)
    assert slots(model)[1] == before[1]
    last.self_attn.apply_o = stand_in.fast_lora.apply_lora_o
    with pytest.raises(AttachError, match=r"sparse forwards were replaced after attach"):
        state.begin_training(object(), max_steps=10)
    detach(model)
    assert not last._forward_pre_hooks
    assert not model._forward_hooks


def test_a_last_layer_without_hook_points_computes_every_row(stand_in):
    """Exact removal is no promise of the configuration, so this is told and not refused."""
    model = stand_in.model()
    last = decoder_layers(model)[2]
    last.mlp.forward = MethodType(unfused_mlp, last.mlp)
    report = attach(model, always(mlp={"0": 0.6}, self_attn={}))
    assert "not the last layer's MLP: base_model.model.model.layers.2: Unsloth's fused MLP" in report.exact_removal
    assert "the last layer's queries and O projection;" in report.exact_removal
    assert get_state(model).hooked_parts() == {(0, "mlp"), (2, "self_attn")}
    detach(model)
    last.self_attn.apply_o = original_apply_o
    report = attach(model, always(mlp={"0": 0.6}, self_attn={}))
    assert report.exact_removal.startswith("logits and loss; not the last layer's MLP")
    assert get_state(model).last_layer is None


def unfused_mlp(self, X):
    return self.down_proj(self.act_fn(self.gate_proj(X)) * self.up_proj(X))


def test_dense_layers_may_hold_anything(stand_in):
    model = stand_in.model(fused=(1,))
    report = attach(model, setting(mlp={"1": 0.5}, self_attn={"1": 0.5}))
    assert report.num_sparse == 1


def foreign(self, X):
    raise NotImplementedError


REFUSALS = {
    "nothing fused": "layers.0: Unsloth's fused MLP is not in mlp.forward",
    "foreign mlp": "layers.1: Unsloth's fused MLP is not in mlp.forward",
    "foreign qkv": "layers.1: Unsloth's fused QKV is not in self_attn.apply_qkv",
    "unfused o": "layers.1: Unsloth's fused O is not in self_attn.apply_o",
    "slots not looked up": "DeafAttention.forward of the installed Unsloth does not call apply_qkv any more",
    "dropout": "lora_dropout=0.1",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_model_as_it_was(stand_in, case):
    model = stand_in.model(fused=() if case == "nothing fused" else (0, 1, 2))
    layer = decoder_layers(model)[1]
    if case == "foreign mlp":
        layer.mlp.forward = MethodType(foreign, layer.mlp)
    elif case == "foreign qkv":
        layer.self_attn.apply_qkv = foreign
    elif case == "unfused o":
        layer.self_attn.apply_o = original_apply_o
    elif case == "slots not looked up":
        layer.self_attn.__class__ = DeafAttention
    elif case == "dropout":
        layer.self_attn.o_proj.lora_dropout["default"] = nn.Dropout(0.1)
    before = slots(model)
    with pytest.raises(AttachError, match=REFUSALS[case]):
        attach(model, setting())
    assert slots(model) == before
    assert get_state(model) is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_release_without_a_function_is_refused(stand_in, name):
    model = stand_in.model()
    delattr(stand_in.fast_lora, name)
    with pytest.raises(AttachError, match=rf"has no {name} in unsloth.kernels.fast_lora: its hook points moved"):
        attach(model, setting())


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("sparsity", [{}, {"preset": "dense", "mlp": {}, "self_attn": {}}], ids=["sparse", "dense"])
@pytest.mark.parametrize("how", ["FSDP2", "FSDP1", "FSDP1, flat"])
def test_sharded_weights_are_refused(stand_in, process_group, how, sparsity):
    """FSDP takes the weights when training begins, after the model was attached."""
    model = stand_in.model()
    attach(model, always(**sparsity))
    layers = decoder_layers(model)
    if how == "FSDP2":
        for layer in layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    else:
        for layer in layers:
            layer.requires_grad_(False)  # flat parameters must agree in it
            FullyShardedDataParallel(layer, use_orig_params=how == "FSDP1", device_id=torch.device("cpu"))
    with pytest.raises(AttachError, match=r"weight is sharded by FSDP.*backend='peft'"):
        get_state(model).begin_training(object(), max_steps=10)
    detach(model)
    if not sparsity:
        with pytest.raises(AttachError, match="weight is sharded by FSDP"):
            attach(model, always())


@pytest.mark.parametrize("slot", ["mlp", *SLOTS])
def test_patching_again_after_attaching_is_noticed(stand_in, slot):
    """As Unsloth does when it loads another adapter."""
    model = stand_in.model()
    attach(model, setting())
    layer = decoder_layers(model)[2]
    if slot == "mlp":
        layer.mlp.forward = MethodType(stand_in.fast_lora.apply_lora_mlp_swiglu, layer.mlp)
    else:
        setattr(layer.self_attn, slot, getattr(stand_in.fast_lora, slot.replace("apply", "apply_lora")))
    with pytest.raises(AttachError, match="1 of 6 sparse forwards were replaced after attach"):
        get_state(model).begin_training(object(), max_steps=10)


def test_a_model_on_the_compiled_path_is_refused():
    """Unsloth loaded it, but put no hook points there."""
    model = make_lora("llama")
    model.__dict__["_sparse_backend"] = "unsloth"
    with pytest.raises(AttachError, match=r"general compiled path.*backend='peft'"):
        attach(model, setting())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(examine()))
