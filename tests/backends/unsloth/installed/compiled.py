"""Each mode on layers whose class the installed Unsloth gated and wrapped for compilation.

Unsloth (2026.10.8 and later) wraps the methods that it patches (`_gated_method`) and compiles each decoder layer's
class forward (`_block_compile._wrap`); here ``torch.compile`` is a stand-in that notes what runs inside.
"""

import copy
import functools
import os

import torch

from sparse_unsloth import attach, detach
from sparse_unsloth.runtime.state import LayerRuntime

from tiny_models import always, loss_and_gradients, make_base, make_batch
from unsloth_stand_in import packed_batch

ALMOST_NOTHING = 1e-9
EXACT = {
    "dense": {"preset": "dense"},
    "rows": {"backward_rows": 1 - ALMOST_NOTHING},
    "channels": always(mlp={"all": ALMOST_NOTHING}, self_attn={"all": ALMOST_NOTHING}),
}


class Watch:
    """Records what runs inside regions that would be compiled."""

    def __init__(self):
        self.inside, self.layers, self.hooks = False, set(), set()

    def compile(self, function, **options):
        def compiled(layer, *args, **kwargs):
            self.inside = True
            self.layers.add(id(layer))
            try:
                return function(layer, *args, **kwargs)
            finally:
                self.inside = False

        return compiled

    def watch_hooks(self):
        """Watches all hooks: each asks its layer's runtime for the rows of the running forward."""
        for name in ("partition", "row_choice"):
            original = getattr(LayerRuntime, name)

            def asked(runtime, *args, original=original):
                if self.inside and runtime.context is not None:
                    self.hooks.add(runtime.layer.index)
                return original(runtime, *args)

            setattr(LayerRuntime, name, asked)


def gate(llama):
    """Gates the classes like Unsloth's loader, by Unsloth's own functions where it has them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if hasattr(llama, "_gate_pre_patch_to_unsloth_models"):
        snapshot = llama._snapshot_transformers_modules(llama.FastLlamaModel)
        llama.FastLlamaModel.pre_patch()
        llama._record_pre_patch_changes(snapshot)
        llama._gate_pre_patch_to_unsloth_models(snapshot)
    else:
        llama.FastLlamaModel.pre_patch()
        LlamaDecoderLayer.forward = functools.wraps(LlamaDecoderLayer.forward)(
            lambda self, *args, fast=LlamaDecoderLayer.forward, **kwargs: fast(self, *args, **kwargs)
        )
    return LlamaDecoderLayer


def wrap(cls, watch):
    """Puts the class forward into a compiled region, by Unsloth's own wrapper where it has one."""
    from unsloth.models import _block_compile

    before, torch.compile = torch.compile, watch.compile
    try:
        _block_compile._wrap(cls, {})
    finally:
        torch.compile = before


def prepare() -> torch.nn.Module:
    return make_base("llama", hidden_size=32, intermediate_size=64)


def examine(base: torch.nn.Module) -> dict[str, dict]:
    """By wrapper, layout and mode: how many layers run as a whole, which ones run compiled, which hooks were traced.

    And how far loss and gradients are from the same model before attaching.
    """
    from unsloth.models import llama

    from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels

    os.environ["UNSLOTH_COMPILE_DISABLE"] = "0"  # read in each forward of a wrapped class
    os.environ["SPARSE_UNSLOTH_KERNELS"] = "triton"
    cls = gate(llama)
    replace_gpu_kernels()
    watch, found = Watch(), {}
    watch.watch_hooks()
    for wrapper in ("gated", "compiled"):
        if wrapper == "compiled":
            wrap(cls, watch)
        model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
        layers = model.get_base_model().model.layers
        numbers = {id(layer): index for index, layer in enumerate(layers)}
        for layout, make in (("padded", make_batch), ("packed", packed_batch)):
            batch = make(lengths=((5, 3), (3, 2)))
            expected = loss_and_gradients(model, batch)
            for name, setting in EXACT.items():
                report = attach(model, setting)
                watch.layers, watch.hooks = set(), set()
                ours = loss_and_gradients(model, batch)
                error = max(
                    ((ours[1][key] - value).norm() / (value.norm() + 1e-12)).item()
                    for key, value in expected[1].items()
                )
                found[f"{wrapper}, {layout}, {name}"] = {
                    "whole": sum("forward" in layer.__dict__ for layer in layers),
                    "report": str(report),
                    "compiled": sorted(numbers[one] for one in watch.layers),
                    "traced": sorted(watch.hooks),
                    "error": max(error, abs(ours[0] - expected[0]).item() / abs(expected[0]).item()),
                }
                detach(model)
                assert not any("_sparse" in key for layer in layers for key in layer.__dict__)
    return found
