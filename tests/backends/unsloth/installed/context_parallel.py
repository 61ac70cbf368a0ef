"""Two gloo processes that hold halves of sequences, in the installed Unsloth's context parallelism."""

import copy
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


def prepare() -> torch.nn.Module:
    return make_base("llama", hidden_size=32, intermediate_size=64)


def examine(base: torch.nn.Module, rank: int) -> dict[str, list]:
    """By setting and layout: how far losses and gradients are from one process's, and the roles of the parts."""
    from unsloth.context_parallel import ContextParallelManager
    from unsloth.models import llama

    llama.FastLlamaModel.pre_patch()
    from unsloth_on_cpu import fused_by_unsloth, replace_gpu_kernels
    from unsloth_stand_in import packed_batch

    dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/store", rank=rank, world_size=RANKS)
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
    dist.destroy_process_group()
    return found
