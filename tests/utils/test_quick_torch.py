"""What tests use in place of PyTorch's walk through a module finds what that finds, in its order."""

import random

import pytest
import torch
from torch import nn

import quick_torch
from tiny_models import make_lora


class Walker(nn.Linear):
    """A module with a walk of its own."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield f"{prefix}!", self


def draw(seed):
    """Modules in modules: some more than once, some absent, one with its own walk."""
    chance = random.Random(seed)
    modules = [nn.Linear(1, 1), Walker(1, 1), nn.Identity()]
    for _ in range(12):
        parent = nn.Module()
        for name in range(chance.randint(0, 4)):
            parent.register_module(str(name), chance.choice([*modules, None]))
        modules.append(parent)
    return modules[-1]


def found(walk, module, **given):
    return [(name, id(one)) for name, one in walk(module, **given)]


@pytest.mark.parametrize("make", [*(lambda seed=seed: draw(seed) for seed in range(20)), make_lora])
def test_the_walk_is_pytorchs(make, monkeypatch):
    model = make()
    assert nn.Module.named_modules is quick_torch.named_modules
    for given in ({}, {"prefix": "here"}, {"remove_duplicate": False}):
        ours = found(quick_torch.named_modules, model, **given)
        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "named_modules", quick_torch.own_named_modules)
            assert ours == found(quick_torch.own_named_modules, model, **given)
    known = {next(iter(model.children()), model)}
    ours = found(quick_torch.named_modules, model, memo=set(known))
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", quick_torch.own_named_modules)
        assert ours == found(quick_torch.own_named_modules, model, memo=set(known))


def test_seeds_are_pytorchs():
    first = torch.manual_seed(3), torch.rand(3)
    assert torch.equal(first[1], torch.rand(3, generator=torch.Generator().manual_seed(3)))
