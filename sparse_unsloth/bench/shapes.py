"""Defines the shapes of benchmarked steps, named or custom, and makes batches of random tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse_unsloth.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``length`` tokens, of which the last ``outputs`` have labels.

    With ``packed`` they are documents of longer sequences of at most ``packed`` tokens, as TRL packs them.
    """

    batch: int
    length: int
    outputs: int
    packed: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def context_tokens(self) -> int:
        """The number of context tokens; the last prompt token is a loss token."""
        return self.batch * max(self.length - self.outputs - 1, 0)


SHAPES = {
    "math10k": Shape(16, 512, 128),
    "codefeedback": Shape(8, 1024, 512),
    "wizardlm": Shape(4, 2048, 512),
    "csr170k": Shape(16, 512, 3),
    "long8k": Shape(1, 8192, 1024),
    "long16k": Shape(1, 16384, 1024),
}
HOST = {"host": Shape(1, 256, 64)}
"""Shapes so small that steps are launch-bound; they are not part of "all"."""
CUSTOM = re.compile(r"custom-(\d+)-(0(?:\.\d+)?)")


def custom_name(tokens: int, context_share: float) -> str:
    """Names one sequence of ``tokens``, of which ``context_share`` are prompt: ``custom-8192-0.75``."""
    return f"custom-{tokens}-{context_share:g}"


def shape_of(name: str) -> Shape:
    """Returns the shape of a name, which may be custom.

    Raises:
        ConfigError: there is no such shape, or a custom one has no token to predict.
    """
    if match := CUSTOM.fullmatch(name):
        tokens, share = int(match[1]), float(match[2])
        outputs = round(tokens * (1 - share))
        if tokens < 2 or outputs < 1:
            raise ConfigError(f"shape {name}: it needs at least two tokens, and one of them to learn")
        return Shape(1, tokens, outputs)
    try:
        return (SHAPES | HOST)[name]
    except KeyError:
        names = ", ".join(SHAPES | HOST)
        raise ConfigError(f"there is no shape {name!r}; shapes are {names}, and custom-TOKENS-SHARE") from None


def shapes_of(names: str | None, tokens: int | None = None, context_share: float | None = None) -> dict[str, Shape]:
    """Returns the shapes of a command line, by name and in its order.

    Args:
        names: "all", or names separated by commas; None is "all" unless a custom shape is given.
        tokens, context_share: one of them, or both, add a custom shape (by default 8192 tokens, 0.75).

    Raises:
        ConfigError: see `shape_of`.
    """
    custom = tokens is not None or context_share is not None
    if names is None:
        names = "" if custom else "all"
    chosen = [part for name in names.split(",") if name for part in (SHAPES if name == "all" else (name,))]
    if custom:
        share = 0.75 if context_share is None else context_share
        chosen.append(custom_name(8192 if tokens is None else tokens, share))
    return {name: shape_of(name) for name in chosen}


def make_batch(shape: Shape, vocab_size: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Makes random tokens, and labels on the outputs of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocab_size, (shape.batch, shape.length), generator=generator)
    labels = ids.clone()
    labels[:, : shape.length - shape.outputs] = -100
    batch = {"input_ids": ids, "labels": labels}
    if shape.packed is not None:
        fewest = -(-shape.tokens // max(shape.packed, shape.length))
        rows = next(rows for rows in range(fewest, shape.batch + 1) if shape.batch % rows == 0)
        labels[:, 0] = -100
        lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32)
        batch = {name: value.view(rows, -1) for name, value in batch.items()}
        batch["position_ids"] = torch.arange(shape.length).repeat(shape.batch).view(rows, -1)
        batch["packed_seq_lengths"] = lengths
    return {name: value.to(device) for name, value in batch.items()}
