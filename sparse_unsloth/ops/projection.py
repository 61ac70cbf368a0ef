"""Reads the frozen weight and the LoRA branch of a projection from ``nn.Linear``, bitsandbytes and PEFT modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.errors import AttachError
from sparse_unsloth.kernels.dequantize import dequantize_columns, dequantize_rows, dequantize_whole
from sparse_unsloth.utils.watch import Watch

QUANTISERS = frozenset({"weight_fake_quantizer", "activation_fake_quantizer"})
"""The names of torchao's fake quantisers, for quantisation-aware training."""


@dataclass(frozen=True)
class BaseWeight:
    """The frozen weight of a projection: floating-point, or 4-bit (NF4, FP4).

    Args:
        weight: ``[out_features, in_features]``, or bitsandbytes' packed ``uint8`` storage.
        quant_state: bitsandbytes' ``QuantState`` of a packed weight, else None.
        bias: ``[out_features]`` or None.
    """

    weight: Tensor
    quant_state: Any = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return tuple(self.weight.shape if self.quant_state is None else self.quant_state.shape)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tensors(self) -> list[Tensor]:
        """All that kernels read of it: the weight, the bias, and what a 4-bit weight is scaled by."""
        state, found = self.quant_state, [self.weight]
        if state is not None:
            found += state.absmax, state.code
            if state.nested:
                found += state.offset, state.state2.absmax, state.state2.code
        return found if self.bias is None else [*found, self.bias]

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The whole weight, ``[out_features, in_features]`` in ``dtype``; of a 4-bit weight always a new tensor.

        ``out``, if given, is written instead; it may have a row stride.
        """
        if self.quant_state is not None:
            return dequantize_whole(self.weight.detach(), self.quant_state, dtype, out)
        weight = self.weight.detach().to(dtype)
        return weight if out is None else out.copy_(weight)

    def rows(self, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Output channels ``index`` (int64 ``[k]``): ``[k, in_features]`` in ``dtype``.

        ``out``, if given, is written instead. If it has more rows, they become zero.
        """
        if self.quant_state is None:
            return _select(self.weight.detach(), 0, index, dtype, out)
        return dequantize_rows(self.weight.detach(), self.quant_state, index, dtype, out)

    def columns(self, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Input channels ``index`` (int64 ``[k]``): ``[out_features, k]`` in ``dtype``; ``out`` as for `rows`."""
        if self.quant_state is None:
            return _select(self.weight.detach(), 1, index, dtype, out)
        return dequantize_columns(self.weight.detach(), self.quant_state, index, dtype, out)


def _select(weight: Tensor, dim: int, index: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        return weight.index_select(dim, index).to(dtype)
    selected = out.narrow(dim, 0, len(index))
    if weight.dtype == dtype:
        torch.index_select(weight, dim, index, out=selected)
    else:
        selected.copy_(weight.index_select(dim, index))
    if out.shape[dim] > len(index):
        out.narrow(dim, len(index), out.shape[dim] - len(index)).zero_()
    return out


@dataclass(frozen=True)
class Lora:
    """A LoRA branch ``scale * (x A') B'``: ``A [r, in_features]``, ``B [out_features, r]``."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Projection:
    """A projection as in docs/how-it-works.md, section 1.2; ``lora`` is None without a LoRA branch."""

    base: BaseWeight
    lora: Lora | None = None


def read_base(module: nn.Module, name: str = "projection") -> BaseWeight:
    """The frozen weight of ``module``, an ``nn.Linear`` or bitsandbytes ``Linear4bit``, bare or wrapped by PEFT.

    Raises:
        AttachError: the layer type is not supported, a 4-bit weight was repacked for CPU inference, or the weight is
            sharded over several processes (see `gather_base`).
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    known = _bases.get(base)
    if known is not None:
        weight, state = base.weight, known.quant_state
        same = known.weight is weight and known.bias is base.bias and _quant_state(base) is state
        if same and not getattr(state, "packing_format_for_cpu", False):
            return known
    if isinstance(base.weight, DTensor):
        raise AttachError(
            f"{name}: its weight is in pieces on several GPUs where the sparse functions read it. With FSDP2 wrap "
            "whole decoder layers (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP), so that they are gathered there; "
            "tensor parallelism has no sparse path."
        )
    known = _bases[base] = _read_base(base, name)
    return known


def gather_base(module: nn.Module, name: str = "projection") -> BaseWeight:
    """`read_base` outside a forward: gathers a weight that FSDP2 has sharded; every rank must call it."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not isinstance(base.weight, DTensor):
        return read_base(module, name)
    found = _read_base(base, name)
    bias = found.bias.full_tensor() if isinstance(found.bias, DTensor) else found.bias
    return BaseWeight(found.weight.full_tensor(), found.quant_state, bias)


def forget_bases(modules: Iterable[nn.Module]) -> None:
    """Forgets the weights that `read_base` cached for ``modules``, because FSDP may replace them."""
    for module in modules:
        _bases.pop(module.get_base_layer() if hasattr(module, "get_base_layer") else module, None)


_bases: WeakKeyDictionary[nn.Module, BaseWeight] = WeakKeyDictionary()
"""Caches `read_base`, which would cost host time in every call of every layer."""


def _quant_state(base: nn.Module) -> Any:
    """bitsandbytes keeps the state on the weight, and on the layer for FSDP's copies of the weight, which lose it."""
    state = getattr(base.weight, "quant_state", None)
    return base.__dict__.get("quant_state") if state is None else state


def _read_base(base: nn.Module, name: str) -> BaseWeight:
    kind = type(base).__name__
    if "FakeQuantized" in kind:
        raise AttachError(f"{name}: {kind} trains quantisation-aware, which has no sparse path. Use its plain layer.")
    quant_state = _quant_state(base)
    if kind in ("Linear4bit", "LinearNF4", "LinearFP4"):
        if quant_state is None:
            raise AttachError(f"{name}: the 4-bit weight is not quantised yet; move the model to its device first.")
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise AttachError(
                f"{name}: bitsandbytes repacked this 4-bit weight for CPU inference (an evaluation forward on a CPU "
                "with AVX512-BF16 does that), and no gradient passes a repacked weight. Load it again and attach "
                "before the first evaluation: attaching turns the repacking off."
            )
        if 2 * base.weight.numel() * base.weight.element_size() < quant_state.shape.numel():
            raise AttachError(
                f"{name}: the 4-bit weight holds fewer bytes than its quantisation says: mixed precision cast its "
                "storage. Set bnb_4bit_quant_storage to the dtype of mixed_precision (bfloat16 for bf16)."
            )
        return BaseWeight(base.weight, quant_state, base.bias)
    if isinstance(base, nn.Linear) and base.weight.dtype.is_floating_point and base.weight.dtype.itemsize > 1:
        return BaseWeight(base.weight, None, base.bias)
    dtype = getattr(getattr(base, "weight", None), "dtype", "no weight")
    raise AttachError(
        f"{name}: layer type {kind} ({dtype}) is not supported. Use 16- or 32-bit weights (load_in_4bit=False), or "
        "bitsandbytes NF4/FP4 (load_in_4bit=True); 8-bit, FP8, GPTQ and AWQ bases have no sparse path."
    )


def read_projection(module: nn.Module, name: str = "projection") -> Projection | None:
    """The projection in its present state, or None if only the module's own forward computes it correctly.

    None is returned if adapters are merged or disabled, if several are active, and if weights or activations are
    fake-quantised (quantisation-aware training).

    Raises:
        AttachError: as `read_base`.
    """
    base = read_base(module, name)
    if not hasattr(module, "lora_A"):
        return Projection(base)
    if module.merged or module.disable_adapters:
        return None
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1:
        return None
    if not active:
        return Projection(base)
    adapter = active[0]
    if is_fake_quantised(module, adapter):
        return None
    lora = Lora(module.lora_A[adapter].weight, module.lora_B[adapter].weight, float(module.scaling[adapter]))
    return Projection(base, lora)


def watch_projection(watch: Watch, tensors: Watch, module: nn.Module, known: Projection) -> bool:
    """Lets two watches hold as long as `read_projection` gives ``known`` for ``module`` again.

    Args:
        watch: gets all but what ``tensors`` gets.
        tensors: gets the weight, LoRA's matrices and its scale, which may change while a model runs (FSDP).
        known: what `read_projection` gave just now.

    Returns:
        Whether they can tell.
    """
    own = module.__dict__
    parts, lora = own["_modules"], known.lora
    base = parts.get("base_layer", module)
    tensors.same(base.__dict__["_parameters"], "weight")
    _watch_linear(watch, base)
    watch.same(parts, "base_layer", "lora_A")
    state = known.base.quant_state
    for holder in (base.__dict__, known.base.weight.__dict__):
        watch.same(holder, "quant_state")
    if state is not None:
        watch.same(state.__dict__, "packing_format_for_cpu", "absmax", "code", "offset", "state2")
        if state.nested:
            watch.same(state.state2.__dict__, "absmax", "code")
    if lora is None:
        return "lora_A" not in parts
    active = own.get("_active_adapter")
    name = active[0] if isinstance(active, list) and len(active) == 1 else active
    if not isinstance(name, str):
        return False
    watch.equal(own, "_active_adapter", [name] if isinstance(active, list) else name)
    watch.equal(own, "merged_adapters", [])
    watch.same(own, "scaling", "_disable_adapters")
    tensors.equal(own["scaling"], name, own["scaling"][name])
    for side in ("lora_A", "lora_B"):
        children = parts[side].__dict__["_modules"]
        tensors.same(children, name)
        tensors.same(children[name].__dict__["_parameters"], "weight")
        _watch_linear(watch, children[name])
    return True


def _watch_linear(watch: Watch, module: nn.Module) -> None:
    """Its class, bias, and children, which may be torchao's fake quantisers."""
    watch.type_of(module)
    watch.same(module.__dict__["_parameters"], "bias")
    watch.same(module.__dict__["_modules"], *QUANTISERS)


def is_fake_quantised(module: nn.Module, adapter: str) -> bool:
    """Whether a projection's base or LoRA matrices, or their inputs, pass through torchao's fake quantisers."""
    base = module._modules.get("base_layer", module)
    return any(
        any(part._modules.get(name) is not None for name in QUANTISERS) or "FakeQuantized" in type(part).__name__
        for part in (base, module.lora_A[adapter], module.lora_B[adapter])
    )


def check_frozen(base: BaseWeight | nn.Module, name: str) -> None:
    """Checks that a base weight is frozen; ``base`` is the result of `read_base`, or the layer.

    Raises:
        AttachError: its weight or bias is trained.
    """
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        raise AttachError(
            f"{name}: the base weight or its bias is trainable, and the sparse functions compute no gradient for "
            "it. Freeze the base model and train LoRA adapters (bias='none'), or leave this layer dense."
        )


def check_adapters(module: nn.Module, name: str) -> None:
    """Checks that the sparse functions compute the active adapters.

    Raises:
        AttachError: DoRA or another LoRA variant, ``lora_dropout > 0``, a LoRA bias, or fake quantisation; the message
            says what to set.
    """
    if not hasattr(module, "lora_A"):
        return
    for adapter in filter(module.lora_A.__contains__, module.active_adapters):
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if getattr(module, "use_dora", {}).get(adapter, False):
            raise AttachError(
                f"{name}: adapter {adapter!r} uses DoRA, which channel sparsity and whole layers do not compute, and "
                "row sparsity takes (backward_rows). Set use_dora=False for the others."
            )
        if variant is not None:
            raise AttachError(
                f"{name}: adapter {adapter!r} uses the LoRA variant {type(variant).__name__}, which has no sparse "
                "path. Use a plain LoraConfig."
            )
        dropout = getattr(module.lora_dropout[adapter], "p", 0.0)  # an nn.Identity where there is none
        if dropout > 0:
            raise AttachError(
                f"{name}: adapter {adapter!r} has lora_dropout={dropout}; the sparse functions compute the LoRA branch "
                "without dropout. Set lora_dropout=0."
            )
        if getattr(module, "lora_bias", {}).get(adapter, False):
            raise AttachError(f"{name}: adapter {adapter!r} has a LoRA bias. Set lora_bias=False.")
        if is_fake_quantised(module, adapter):
            raise AttachError(
                f"{name}: weights or activations are fake-quantised (quantisation-aware training), which the sparse "
                "functions would leave out. Train without qat_scheme, or leave this layer dense."
            )
