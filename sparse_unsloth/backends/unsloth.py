"""Hook points of Unsloth's fast path: ``mlp.forward``, ``self_attn.apply_qkv``, ``self_attn.apply_o``.

Everything else of Unsloth stays: RoPE, attention dispatch, norms, loss, checkpointing with offload. A replaced function
is kept and called whenever the masked forward does not apply, so dense layers and dense phases run Unsloth's own.
Unsloth is imported when a model is loaded, never before.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.backends import peft as peft_backend
from sparse_unsloth.backends import row_hooks, unsloth_layer, unsloth_rows
from sparse_unsloth.backends.replaced import replace_forward, runs, untraced
from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions.implementation import use_kernels
from sparse_unsloth.functions.linear import SelectedProjection, sparse_linear
from sparse_unsloth.layer_rules import PARTS
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.saved_adapters import base_of, find_adapter, vocabulary_of
from sparse_unsloth.weights import read_projection

logger = logging.getLogger("sparse_unsloth")

NAME = "unsloth"
FUSED_MLPS = ("apply_lora_mlp_swiglu", "apply_lora_mlp_geglu_exact", "apply_lora_mlp_geglu_approx")


def load(
    model_name: str, max_seq_length: int, dtype: torch.dtype | None, load_in_4bit: bool, **kwargs: Any
) -> tuple[nn.Module, Any]:
    """``unsloth.FastLanguageModel.from_pretrained``, every argument handed on.

    Raises:
        DataError: the adapter that ``model_name`` means is damaged, or its base model was moved.
    """
    adapter = find_adapter(model_name)
    if adapter is not None:
        base, vocabulary = base_of(adapter), vocabulary_of(adapter)
        if vocabulary is not None:
            from transformers import AutoConfig

            hub = {name: kwargs[name] for name in ("token", "trust_remote_code") if name in kwargs}
            if AutoConfig.from_pretrained(base, **hub).get_text_config().vocab_size != vocabulary:
                kwargs.setdefault("resize_model_vocab", vocabulary)
    if "trl" in sys.modules and "unsloth" not in sys.modules:
        logger.warning(
            "TRL was imported before Unsloth, which replaces TRL's trainers when it is imported: trainers that your "
            "script imported already stay TRL's own. Put `import unsloth` at the top of the script."
        )
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        model_name=model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit, **kwargs
    )


def add_lora(model: nn.Module, **kwargs: Any) -> nn.Module:
    """``unsloth.FastLanguageModel.get_peft_model``, every argument handed on."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **kwargs)


def for_training(model: nn.Module, use_gradient_checkpointing: bool | str | None = None) -> nn.Module:
    """Unsloth's own switch."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing)
    return model


def for_inference(model: nn.Module) -> nn.Module:
    """Unsloth's own switch, with its fast decoding."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    return model


def install(runtime: LayerRuntime) -> None:
    """Hooks what the layer's sparsity asks for, and lists the modules in ``runtime.state.hooked``.

    Raises:
        AttachError: Unsloth did not put the function there that is to be replaced, or its class does not call it any
            more; or a projection that the sparse functions cannot compute.
    """
    contract = Contract()
    if runtime.state.by_rows:
        refuse_sharded_weights(runtime.layer)
        row_hooks.install_mlp(runtime)
        contract.check_attention(runtime.layer)
        attention = runtime.layer.self_attn
        row_hooks.probe(runtime.layer, "self_attn.o_proj", partial(attention.apply_o, attention))
        _hook_attention(runtime)
        return
    for part in PARTS:
        if getattr(runtime.sparsity, part) > 0:
            _install(contract, runtime, part)


def install_on_last_layer(runtime: LayerRuntime) -> dict[str, str]:
    """Lets the last layer leave out rows without loss, where that can be had.

    Args:
        runtime: of the last layer, its sparse parts hooked already.

    Returns:
        By part that does not, why not: the training is right without it, and slower.
    """
    contract, reasons = Contract(), {}
    for part in PARTS:
        if getattr(runtime.sparsity, part) == 0:
            try:
                _install(contract, runtime, part)
            except AttachError as error:
                reasons[part] = str(error)
    runtime.parts = tuple(part for part in PARTS if part not in reasons)
    return reasons


def install_whole_layers(runtimes: Iterable[LayerRuntime]) -> None:
    """Replaces the forward of whole layers, once their parts are hooked, where they have the form for it.

    The probe forward proves them afterwards. ``not_whole`` of each runtime says why a layer has none.
    """
    contract = Contract()
    for runtime in runtimes:
        form = unsloth_rows if runtime.state.by_rows else unsloth_layer
        leaves_out = runtime.state.by_rows and runtime.layer.index not in runtime.state.runtimes
        runtime.not_whole = unsloth_layer.LEAVES_OUT_ROWS if leaves_out else form.why_not(runtime)
        if runtime.not_whole:
            continue
        try:
            if "_sparse_original" not in runtime.layer.self_attn.__dict__:
                _install(contract, runtime, "self_attn")
        except AttachError as error:
            runtime.not_whole = str(error)
        else:
            form.replace(runtime)


def uninstall_whole_layer(runtime: LayerRuntime) -> None:
    """Gives a layer its own forward back; of the hooks of its parts those stay that are needed by themselves."""
    module, attention, state = runtime.layer.module, runtime.layer.self_attn, runtime.state
    if not runs(module, unsloth_layer.layer_forward, unsloth_rows.layer_forward):
        return
    removed = [module]
    uninstall(module)
    module.__dict__["_sparse_runtime"] = runtime  # the layer's hooks read it
    if not (state.by_rows or runtime.sparsity.self_attn > 0 or "self_attn" in runtime.parts):
        uninstall(attention)
        removed.append(attention)
    state.hooked = [one for one in state.hooked if not any(one is gone for gone in removed)]


def refuse_sharded_weights(layer: DecoderLayer) -> None:
    """Raises AttachError if FSDP holds the layer's weights: the hooks read them where no unsharding reaches."""
    for name, module in layer.projections().items():
        for part in module.modules():
            weight = getattr(part, "weight", None)
            sharded = isinstance(weight, DTensor) or peft_backend.is_flattened(part)
            if isinstance(weight, Tensor) and sharded:
                raise AttachError(
                    f"{layer.name}.{name}: its weight is sharded by FSDP, and the hooks of the Unsloth backend read "
                    "whole weights. Load the model with backend='peft' for FSDP, or train with DDP (one model a GPU)."
                )


def _install(contract: Contract, runtime: LayerRuntime, part: str) -> None:
    layer = runtime.layer
    refuse_sharded_weights(layer)
    if part == "mlp":
        contract.check_mlp(layer)
        peft_backend.check(layer, "mlp")
        peft_backend.probe_mlp(layer)
        replace_forward(layer.mlp, peft_backend.mlp_forward, runtime)
        return
    contract.check_attention(layer)
    peft_backend.check(layer, "self_attn")
    _hook_attention(runtime)


def _hook_attention(runtime: LayerRuntime) -> None:
    attention = runtime.layer.self_attn
    attention.__dict__["_sparse_original"] = attention.apply_qkv, attention.apply_o
    attention.__dict__["_sparse_runtime"] = runtime
    attention.apply_qkv, attention.apply_o = untraced(_apply_qkv), untraced(_apply_o)
    runtime.state.hooked.append(attention)


def uninstall(module: nn.Module) -> None:
    """Gives ``module`` the functions back that `install` replaced."""
    if "apply_qkv" not in module.__dict__:
        peft_backend.uninstall(module)
        return
    module.apply_qkv, module.apply_o = module.__dict__.pop("_sparse_original")
    module.__dict__.pop("_sparse_runtime")


def is_installed(module: nn.Module) -> bool:
    """Whether the functions that `install` put there are still the ones that run."""
    if "apply_qkv" not in module.__dict__:
        whole = runs(module, unsloth_layer.layer_forward, unsloth_rows.layer_forward)
        return whole or peft_backend.is_installed(module)
    ours = module.apply_qkv is untraced(_apply_qkv) and module.apply_o is untraced(_apply_o)
    return ours and "_sparse_runtime" in module.__dict__


def why_not_captured(runtime: LayerRuntime) -> str:
    """What keeps the layer's work from functions that CUDA graphs can hold; "" for nothing."""
    if not use_kernels(next(runtime.layer.module.parameters())):
        return "Triton's kernels do not run here"
    return runtime.not_whole or (runtime.not_fusable if runtime.state.by_rows else "")


def _apply_qkv(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.handed:
        return runtime.handed
    partition = runtime.partition("self_attn", self, hidden_states)
    modules = (self.q_proj, self.k_proj, self.v_proj)
    projections = None if partition is None else [read_projection(module) for module in modules]
    if projections is None or None in projections:
        return self._sparse_original[0](self, hidden_states, *args, **kwargs)
    context = runtime.context
    if not runtime.is_sparse("self_attn"):  # the last layer, whose keys and values are needed of every row
        query, *others = (SelectedProjection(projection) for projection in projections)
        (q,) = sparse_linear(hidden_states, partition, [query])
        return q, *sparse_linear(hidden_states, context.every_row_dense(), others)
    chosen = runtime.attention_channels(context.partition, hidden_states)
    parts = [peft_backend.select(*each, chosen) for each in zip(projections, "qkv", strict=True)]
    return sparse_linear(hidden_states, context.partition, parts)


def _apply_o(self: nn.Module, attention_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.handed is not None:
        return attention_output
    choice = runtime.row_choice(self, attention_output)
    if choice is not None and not (args or kwargs):
        function = partial(self._sparse_original[1], self)
        return row_hooks.through_output(function, attention_output, self.o_proj, choice, runtime)
    partition = runtime.partition("self_attn", self, attention_output)
    projection = None if partition is None else read_projection(self.o_proj)
    if projection is None:
        return self._sparse_original[1](self, attention_output, *args, **kwargs)
    part = peft_backend.select(projection, "o", runtime.attention_channels(partition))
    runtime.record_run("self_attn")
    return sparse_linear(attention_output, partition, [part])[0]


class Contract:
    """What this backend needs of the installed Unsloth: the names it replaces, and that they are still called."""

    def __init__(self) -> None:
        from unsloth.kernels import fast_lora
        from unsloth.models import llama

        self._functions: ModuleType = fast_lora
        self._plain_qkv = getattr(llama, "original_apply_qkv", None)
        missing = [name for name in (*FUSED_MLPS, "apply_lora_qkv", "apply_lora_o") if not hasattr(fast_lora, name)]
        if missing:
            raise AttachError(
                f"The installed Unsloth has no {', '.join(missing)} in unsloth.kernels.fast_lora: its hook points "
                "moved. Install a version that sparse_unsloth is tested with (`sparse-unsloth doctor` lists it), or "
                "use backend='peft'."
            )

    def check_mlp(self, layer: DecoderLayer) -> None:
        """Raises AttachError unless Unsloth's fused MLP stands where it is to be replaced."""
        slots = (layer.mlp.__dict__.get("_unsloth_forward"), layer.mlp.__dict__.get("forward"))
        fused = [getattr(self._functions, name) for name in FUSED_MLPS]
        if not any(_unwrap(slot) in fused for slot in slots if slot is not None):
            raise self._not_fused(layer, "mlp.forward", "MLP")

    def check_attention(self, layer: DecoderLayer) -> None:
        """Raises AttachError unless Unsloth's Q, K, V and O functions stand there, and the class calls them."""
        attention = layer.self_attn
        # Unsloth never fuses biased Q, K, V (Qwen2): there its plain function stands in the slot.
        allowed = [self._functions.apply_lora_qkv, self._plain_qkv]
        if getattr(attention, "apply_qkv", None) not in allowed:
            raise self._not_fused(layer, "self_attn.apply_qkv", "QKV")
        if getattr(attention, "apply_o", None) is not self._functions.apply_lora_o:
            raise self._not_fused(layer, "self_attn.apply_o", "O")
        code = inspect.unwrap(type(attention).forward).__code__
        for name in ("apply_qkv", "apply_o"):
            if name not in code.co_consts and name not in code.co_names:
                raise AttachError(
                    f"{layer.name}.self_attn: {type(attention).__name__}.forward of the installed Unsloth does not "
                    f"call {name} any more, so replacing it would change nothing. Use backend='peft'."
                )

    @staticmethod
    def _not_fused(layer: DecoderLayer, slot: str, what: str) -> AttachError:
        return AttachError(
            f"{layer.name}: Unsloth's fused {what} is not in {slot}, so there is nothing to replace. Unsloth fuses it "
            "on its fast path (Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, Gemma2) when its projections have LoRA, "
            "lora_dropout=0 and bias='none', and the base is not float32, 8-bit or split by FSDP. Change that, leave "
            "the layer dense, or use backend='peft'."
        )


def _unwrap(slot: Any) -> Any:
    """The plain function in a slot that holds a function, a bound method, or a partial of one."""
    function = getattr(slot, "__func__", slot)
    return getattr(function, "func", function)
