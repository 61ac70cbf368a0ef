"""A script: one of two gloo processes that hold halves of sequences, in the installed Unsloth's context parallelism.

Each prints as JSON how far gradients are from those of one process that has the whole sequences, by setting and layout.
In a process of its own, as importing Unsloth changes torch and transformers for good.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sparse_unsloth import attach, detach, get_state

from tiny_models import always, loss_and_gradients, make_base, make_batch

RANKS = 2
LENGTHS = (20, 12), (16, 8), (7, 4), (26, 5)
"""Of prompts and answers: a prompt that ends with the first half, and a second half of padding, among others."""
SETTINGS = {
    "channels": always(mlp={"1-2": 0.6}, self_attn={"2": 0.5}, criterion="magnitude"),  # the same in each part
    "rows": {"backward_rows": 0.999},  # all of them, through what chooses
    "rows within a budget": {"backward_rows": 0.999, "memory_budget": 1000.0},
    "dense": {"preset": "dense"},
}


def attached(model: torch.nn.Module, name: str):
    samples = [make_batch(seed=seed) for seed in (1, 2)] if name == "channels" else None
    attach(model, SETTINGS[name], calibration_samples=samples)
    state = get_state(model)
    state.begin_training("test", 100)
    state.set_step(0)
    return state


def examine() -> dict[str, list]:
    """By setting and layout: how far apart losses and gradients are, and the roles of the parts."""
    torch.set_num_threads(1)
    base = make_base("llama", hidden_size=32, intermediate_size=64)
    import unsloth  # noqa: F401
    from unsloth.context_parallel import ContextParallelManager
    from unsloth.models import llama

    llama.FastLlamaModel.pre_patch()
    from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels
    from unsloth_stand_in import packed_batch

    replace_gpu_kernels()
    model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
    manager = ContextParallelManager(RANKS, "ulysses")
    manager.attach_attention_hooks(model)
    found = {}
    for name in SETTINGS:
        for layout, make in {"padded": make_batch, "packed": packed_batch}.items():
            batch = make(lengths=LENGTHS)
            batch["num_items_in_batch"] = (batch["labels"][:, 1:] != -100).sum()
            state = attached(model, name)
            loss, expected = loss_and_gradients(model, dict(batch))
            roles = [state.counts.dense_tokens, state.counts.context_tokens]
            detach(model)
            state = attached(model, name)
            part = dict(batch)
            with manager.apply(part):
                mine, gradients = loss_and_gradients(model, part)
            for tensor in (mine, *gradients.values()):
                dist.all_reduce(tensor)
            parts = torch.tensor([state.counts.dense_tokens, state.counts.context_tokens])
            dist.all_reduce(parts)
            detach(model)
            apart = max(((gradients[key] - value).norm() / value.norm()).item() for key, value in expected.items())
            found[f"{name}, {layout}"] = [abs(mine - loss).item(), apart, roles, parts.tolist()]
    return found


if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=RANKS)
    (folder / f"found-{number}.json").write_text(json.dumps(examine()))
    dist.destroy_process_group()
