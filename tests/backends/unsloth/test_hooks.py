"""The hooks of the Unsloth backend, on the installed release and on stand-ins that break one thing each."""

import importlib
import importlib.util
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends.unsloth import hooks as backend
from sparse_unsloth.backends.unsloth.contract import FUSED_FUNCTIONS
from sparse_unsloth.errors import AttachError

from tiny_models import always, loss_and_gradients, make_batch, make_lora
from unsloth_stand_in import (
    SLOTS,
    DeafAttention,
    assert_same,
    decoder_layers,
    original_apply_o,
    original_apply_qkv,
    slots,
)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
@pytest.mark.installed_unsloth("release")
def test_the_installed_release(unsloth_case):
    """Each entry of ``problems`` names what does not hold any more."""
    ((problems,), _) = unsloth_case
    assert problems == {}, "\n\n".join(f"{name}: {text}" for name, text in problems.items())


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
    """`exact_removal` only saves work, so this is reported and raises no error."""
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


@pytest.mark.parametrize("name", FUSED_FUNCTIONS)
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
    """FSDP shards the weights when training begins, after the model was attached."""
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
    """Unsloth does so when it loads another adapter."""
    model = stand_in.model()
    attach(model, setting())
    layer = decoder_layers(model)[2]
    if slot == "mlp":
        layer.mlp.forward = MethodType(stand_in.fast_lora.apply_lora_mlp_swiglu, layer.mlp)
    else:
        setattr(layer.self_attn, slot, getattr(stand_in.fast_lora, slot.replace("apply", "apply_lora")))
    with pytest.raises(AttachError, match="1 of 6 sparse forwards were replaced after attach"):
        get_state(model).begin_training(object(), max_steps=10)
