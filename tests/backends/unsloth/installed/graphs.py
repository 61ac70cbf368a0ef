"""`cuda_graphs` on the layers of the installed Unsloth.

Captures are stand-ins
(`recorded_layers.Rerun`), the project's kernels run through Triton's interpreter, Unsloth's are the same mathematics.
"""

import copy
import importlib
import os
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth import attach, detach, get_state

from tiny_models import always, loss_and_gradients, make_base, make_batch

LENGTHS = ((5, 3), (3, 2)), ((3, 2), (5, 3))
"""Of two batches: as many tokens of each kind, in other places."""
KEPT = "without checkpointing"
SETTINGS = {
    "channels": always(mlp={"0-1": 0.6}, self_attn={"0": 0.5}),
    "rows": {"backward_rows": 0.25},
    "dense": {"preset": "dense"},
}
LAYOUTS = {
    "llama, channels": ("packed", "xformers"),
    "llama, rows": ("packed", KEPT),
    "mistral, dense": ("packed",),
    "gemma2, dense": (KEPT,),
}
"""By family and setting; Mistral and Gemma 2 have windows shorter than the sequence, Gemma 2 masks of two kinds."""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
"""The last layer skips unused rows and is not captured."""
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 0.5, "head_dim": 8, "num_hidden_layers": 3},
}


def load_xformers(patch: pytest.MonkeyPatch, asked: list) -> None:
    """Makes Unsloth use xformers' attention, a stand-in since it has GPU kernels only; ``asked`` gets its masks."""
    from unsloth.models import llama
    from unsloth.utils import attention_dispatch, packing
    from xformers.ops.fmha import attn_bias

    def attention(query, key, value, attn_bias):
        asked.append(attn_bias)
        q, k, v = (values.flatten(2, -2).transpose(1, 2) for values in (query, key, value))  # heads may be in groups
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return output.transpose(1, 2).view(query.shape)

    for module in (llama, attention_dispatch):
        patch.setattr(module, "xformers", SimpleNamespace(attn_bias=attn_bias))
        patch.setattr(module, "HAS_XFORMERS", True)
    patch.setattr(packing, "_XFormersBlockMask", attn_bias.BlockDiagonalCausalMask)
    patch.setattr(attention_dispatch, "xformers_attention", attention)


def prepare() -> dict[str, torch.nn.Module]:
    return {family: make_base(family, **{**SMALL, **changes}) for family, changes in FAMILIES.items()}


def examine(bases: dict[str, torch.nn.Module]) -> dict[str, list]:
    """By setting and layout: the captured calls, and how often each was replayed."""
    os.environ["SPARSE_UNSLOTH_KERNELS"] = "triton"
    for family in FAMILIES:
        module = importlib.import_module(f"unsloth.models.{family}")
        getattr(module, f"Fast{family.capitalize()}Model").pre_patch()
    from recorded_layers import Rerun, share_memory, step_as_recorded
    from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels
    from unsloth_stand_in import assert_same, packed_batch

    replace_gpu_kernels()
    found = {}
    for name, layouts in LAYOUTS.items():
        family, rules = name.split(", ")
        setting = SETTINGS[rules]
        for layout in layouts:
            make = make_batch if layout == "xformers" else packed_batch
            with pytest.MonkeyPatch.context() as patch:
                model, asked = fused_by_unsloth(copy.deepcopy(bases[family]), layout != KEPT), []
                if layout == "xformers":
                    load_xformers(patch, asked)
                recorder = Rerun()
                share_memory(patch, recorder)
                batches = [make(seed=seed, lengths=lengths) for seed, lengths in enumerate(LENGTHS)]
                plain = loss_and_gradients(model, batches[0])
                expected = [step_as_recorded(model, batch, setting) for batch in batches]
                if rules == "dense":
                    assert_same(expected[0], plain)
                attach(model, {**setting, "cuda_graphs": True})
                for step in range(3):
                    asked.clear()
                    assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
                if layout == "xformers":
                    assert len(asked) == 2, "the last layer, which skips unused rows, forward and again"
                graphs = get_state(model).graphs
                passes = [*graphs._captures.values()]
                passes += [one for kept in graphs._kept.values() for one in kept.passes.values()]
                calls = sorted({call for _, calls, _ in passes for call in calls})
                found[f"{name}, {layout}"] = [calls, recorder.replayed // max(recorder.recorded, 1)]
                detach(model)
    return found
