"""A script: `cuda_graphs` on the layers of the installed Unsloth, on the CPU; prints as JSON what was captured.

In a process of its own, as importing Unsloth changes torch and transformers for good. Captures are stand-ins
(`recorded_layers.Rerun`), the project's kernels run through Triton's interpreter, Unsloth's are the same mathematics.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth import attach, detach, get_state

from tiny_models import always, loss_and_gradients, make_base, make_batch

LENGTHS = ((7, 3), (5, 2)), ((4, 2), (8, 3))
"""Of two batches: as many tokens of each kind, in other places."""
KEPT = "without checkpointing"
SETTINGS = {
    "channels": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}),
    "rows": {"backward_rows": 0.25},
    "dense": {"preset": "dense"},
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


def examine() -> dict[str, list]:
    """By setting and layout: the captured calls, and how often each was replayed."""
    torch.set_num_threads(1)
    base = make_base("llama", hidden_size=32, intermediate_size=64)
    import unsloth  # noqa: F401
    from unsloth.models import llama

    llama.FastLlamaModel.pre_patch()
    from recorded_layers import Rerun, share_memory, step_as_recorded
    from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels
    from unsloth_stand_in import assert_same, packed_batch

    layouts = {
        "channels": {"padded": make_batch, "packed": packed_batch, "xformers": make_batch},
        "rows": {"packed": packed_batch, KEPT: packed_batch},
        "dense": {"padded": make_batch, KEPT: packed_batch},
    }
    replace_gpu_kernels()
    models, found = [fused_by_unsloth(copy.deepcopy(base), checkpointing) for checkpointing in (True, False)], {}
    for name, setting in SETTINGS.items():
        for layout, make in layouts[name].items():
            with pytest.MonkeyPatch.context() as patch:
                model, asked = models[layout == KEPT], []
                if layout == "xformers":
                    load_xformers(patch, asked)
                recorder = Rerun()
                share_memory(patch, recorder)
                batches = [make(seed=seed, lengths=lengths) for seed, lengths in enumerate(LENGTHS)]
                expected = [step_as_recorded(model, batch, setting) for batch in batches]
                attach(model, {**setting, "cuda_graphs": True})
                for step in range(3):
                    asked.clear()
                    assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
                if layout == "xformers":
                    assert len(asked) == 2, "the first layer, which is dense, forward and again"
                graphs = get_state(model).graphs
                passes = [*graphs._captures.values()]
                passes += [one for kept in graphs._kept.values() for one in kept.passes.values()]
                calls = sorted({call for _, calls, _ in passes for call in calls})
                found[f"{name}, {layout}"] = [calls, recorder.replayed // max(recorder.recorded, 1)]
                detach(model)
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(examine()))
