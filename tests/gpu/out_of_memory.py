"""A training step that truly runs out of GPU memory, in Unsloth's layers and in ours: what stays, and does it go on.

    python tests/gpu/out_of_memory.py --model /tmp/llama4

Each case lets a step have 50 or 95 percent of the memory that it needs: it fails in the forward or in the backward.
Then the memory in use must be what it was, and the next step the one that a model which never failed takes. The model
is any checkpoint; of random weights at full width four layers suffice. Exits with 1 if a case is not so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback

import unsloth  # isort: skip  # noqa: F401  # first, as it asks
import torch

from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
from sparse_unsloth.bench.methods import sparsity_of
from sparse_unsloth.bench.models import load_model
from sparse_unsloth.bench.shapes import Shape, make_batch

METHODS = ("unsloth-dense", "sparse-25", "rows-25")
DOCUMENT = 4096
LEFT = 2**26
"""Bytes that may stay: caches of the allocator's users, not activations."""
APART = 0.01
"""How far the next step's gradients may be from those before: attention's backward adds in no fixed order, and two
steps alike were up to 0.0024 apart."""


def take_step(model, tokens: int) -> list[torch.Tensor]:
    """The gradients of one step on packed documents."""
    batch = make_batch(Shape(tokens // DOCUMENT, DOCUMENT, 512, packed=tokens), model.config.vocab_size, 1, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def forget(model) -> int:
    """Bytes in use between steps."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def place(error: BaseException) -> str:
    """The innermost lines that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}" for frame in reversed(frames))


def fails_and_goes_on(model, tokens: int, share: float) -> bool:
    """Prints what one case did, after a step that succeeds, whose peak the share is of."""
    forget(model)
    torch.cuda.reset_peak_memory_stats()
    expected = take_step(model, tokens)
    peak = torch.cuda.max_memory_allocated()
    noise = max(float((a - b).norm() / b.norm()) for a, b in zip(repeat(model, tokens), expected, strict=True))
    before = forget(model)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + share * (peak - before)) / total)
    where = None
    try:
        take_step(model, tokens)
    except torch.OutOfMemoryError as error:
        where = place(error)
    torch.cuda.set_per_process_memory_fraction(1.0)
    stayed = forget(model) - before
    again = repeat(model, tokens)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(again, expected, strict=True))
    good = where is not None and stayed <= LEFT and apart <= APART
    print(
        f"  {share:.0%} of {(peak - before) / 2**30:.2f} GiB: {'failed in ' + where if where else 'did not fail'}; "
        f"{stayed / 2**20:.1f} MiB stayed; the next step's gradients within {apart:.1e} (a step twice: {noise:.1e})",
        flush=True,
    )
    return good


def repeat(model, tokens: int) -> list[torch.Tensor]:
    forget(model)
    return take_step(model, tokens)


def prepare(model, method: str, checkpointing: str) -> None:
    if get_state(model) is not None:
        detach(model)
    kept = checkpointing == "none"
    FastSparseLanguageModel.for_training(model, use_gradient_checkpointing=False if kept else checkpointing)
    for module in model.modules():
        if kept and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    sparsity = sparsity_of(method, model.config.num_hidden_layers)
    if sparsity is not None:
        attach(model, sparsity)
        state = get_state(model)
        state.begin_training(driver="out of memory", max_steps=1000)
        state.set_step(0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit")
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args(argv)
    args.rank, args.checkpointing = 16, "unsloth"
    model = load_model(args, "unsloth", args.tokens)
    wrong = 0
    for method in METHODS:
        for checkpointing in ("unsloth", "none"):
            print(f"{method}, checkpointing {checkpointing}, {args.tokens} tokens", flush=True)
            prepare(model, method, checkpointing)
            for _ in range(2):
                repeat(model, args.tokens)  # Unsloth's buffers grow, Triton compiles
            wrong += sum(not fails_and_goes_on(model, args.tokens, share) for share in (0.5, 0.95))
    print(f"{wrong} cases wrong" if wrong else "all cases right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
