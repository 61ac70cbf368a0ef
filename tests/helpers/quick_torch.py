"""Spares PyTorch what tests make it do many thousand times; results are the same."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn

NO_STACKS = SimpleNamespace(format_stack=list)
own_named_modules = nn.Module.named_modules


def install() -> None:
    """Replaces the walk through a module; leaves out the stacks that each seed keeps for GPUs that are not there."""
    nn.Module.named_modules = named_modules
    for device in (torch.cuda, torch.xpu):
        if not device.is_available():
            device.traceback = NO_STACKS


def named_modules(
    self: nn.Module, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As PyTorch's, whose generator of each module hands on what those below it find, eight deep in a PEFT model."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    if remove_duplicate:
        memo.add(self)
    yield prefix, self
    above = [(prefix, iter(self._modules.items()))]
    while above:
        path, children = above[-1]
        for name, module in children:
            if module is None:
                continue
            place = f"{path}.{name}" if path else name
            if type(module).named_modules is not named_modules:
                yield from module.named_modules(memo, place, remove_duplicate)
            elif module not in memo:
                if remove_duplicate:
                    memo.add(module)
                yield place, module
                above.append((place, iter(module._modules.items())))
                break
        else:
            above.pop()
