"""Models of the rank-sparse tests, and their masked reference."""

import math

import torch
from torch import nn

from sparse_unsloth import rank
from sparse_unsloth.rank.layer import RankLayer

from tiny_models import loras, make_base, make_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R = 12


def make(base=None, seed=0, lora_b=0.05, dtype=torch.float64, r=R, **config):
    """A PEFT model of rank ``r`` whose LoRA branches are not zero."""
    from peft import LoraConfig, get_peft_model

    base = make_base(seed=seed, dtype=dtype) if base is None else base
    torch.manual_seed(seed + 1)
    options = {"r": r, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in loras(model).items():
            if "lora_B" in name:
                parameter.normal_(0, lora_b)
    return model.train()


GAIN = math.sqrt(R / 4)
"""Of the 4 of 12 components that `apply` computes."""


def apply(model, density=0.34, past_warmup=True, **options):
    """Makes a model rank-sparse, with the warm-up finished."""
    state = rank.apply(model, density, **({"warmup_steps": 1, "importance_lambda": 0.15} | options))
    if past_warmup:
        model(**make_batch(seed=9))
        state.advance()
    return state


def mask_components(model, chosen):
    """The masked reference: a plain model whose ``x A'`` is multiplied by scaled masks of the chosen components."""
    for name, module in model.named_modules():
        if name in chosen:
            mask = torch.zeros(len(module.lora_A["default"].weight), dtype=module.lora_A["default"].weight.dtype)
            mask[chosen[name]] = math.sqrt(len(mask) / len(chosen[name]))
            module.lora_A["default"].register_forward_hook(lambda m, a, output, mask=mask: output * mask)
    return model


def assert_same(left, right, rtol=1e-9, atol=1e-12):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def train(model, steps, optimizer=None, start=0, lr=0.01):
    optimizer = optimizer or torch.optim.AdamW(loras(model).values(), lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = model(**make_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model):
    return {name: parameter.detach().clone() for name, parameter in loras(model).items()}


def record_choices(monkeypatch):
    """The components of each layer's last forward, by name."""
    found, choose = {}, RankLayer._choose

    def record(layer, source):
        found[layer.name] = choose(layer, source)
        return found[layer.name]

    monkeypatch.setattr(RankLayer, "_choose", record)
    return found


def one_layer(r=6, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5)), LoraConfig(r=r, target_modules=["0"]))
    model.train()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    state = rank.apply(
        model, **({"target_density": 0.5, "importance_lambda": 0.15, "warmup_steps": 1, "prune_after": 0} | options)
    )
    return model, state, state.layers[0]


def importance_of(layer, x):
    c = torch.stack([(x @ layer.whole_A[i]).norm() * layer.whole_B[:, i].norm() for i in range(layer.rank)])
    return (c / c.sum()).detach()
