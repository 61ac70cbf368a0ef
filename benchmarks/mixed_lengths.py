"""Steps on micro-batches as data give them: every one of another length.

    python benchmarks/mixed_lengths.py --model /tmp/llama8b --out runs/mixed

`sparse-unsloth bench` repeats one shape. Here each micro-batch has ``--documents`` documents of random tokens, prompts
of 250 tokens in the median and answers of 120 (log-normal, sigma 0.6 and 0.7), padded or laid one behind the other
(padding-free, what Unsloth does by itself). Every method goes through the same micro-batches four times, as the same
sizes come again in a long training: recordings are made in the third round and used in the fourth, whose time counts.
Tokens are those of the documents. Each method is checked first, as in the bench; rows are appended to
``mixed_lengths.csv``.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from sparse_unsloth.functions.graphs import SEEN_BEFORE

COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "layout", "method", "documents", "steps", "tokens",
    "recording_s", "round_s", "recorded_share", "kinds", "peak_gib", "used_gib",
)  # fmt: skip
METHODS = "unsloth-dense,dense-graphs,rows-25,rows-25-graphs,sparse-o2,sparse-o2-graphs"
ROUNDS = SEEN_BEFORE + 2
PROMPT, ANSWER = (250, 0.6), (120, 0.7)
LONGEST = 2048


def make_batches(layout: str, documents: int, steps: int, vocab_size: int, seed: int = 0) -> list[dict]:
    """Micro-batches on the CPU, as a collator hands them over; ``layout`` "padded" or "flat"."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(median: float, sigma: float) -> int:
        return max(4, min(LONGEST // 2, round(median * (sigma * torch.randn((), generator=generator)).exp().item())))

    batches = []
    for _ in range(steps):
        sizes = [(draw(*PROMPT), draw(*ANSWER)) for _ in range(documents)]
        length = max(map(sum, sizes))
        ids = torch.randint(10, vocab_size, (documents, length), generator=generator)
        position = torch.arange(length)[None]
        prompts, ends = (torch.tensor(column)[:, None] for column in zip(*((p, p + a) for p, a in sizes), strict=True))
        mask = position < ends
        labels = ids.where(mask & (position >= prompts), torch.tensor(-100))
        if layout == "padded":
            batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask.long()})
            continue
        labels[:, 0] = -100
        batches.append(
            {
                "input_ids": ids[mask][None],
                "labels": labels[mask][None],
                "position_ids": position.expand_as(ids)[mask][None],
                "packed_seq_lengths": ends.flatten().int(),
            }
        )
    return batches


def round_of(model, batches: list[dict], optimiser, graphs) -> tuple[float, int]:
    """Seconds, and how many forwards were recorded or replayed."""
    import torch

    recorded, last = 0, None if graphs is None else graphs.forward
    torch.cuda.synchronize()
    began = time.perf_counter()
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**{name: values.cuda(non_blocking=True) for name, values in batch.items()}).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if graphs is not None and graphs.forward is not last:
            recorded, last = recorded + 1, graphs.forward
    torch.cuda.synchronize()
    return time.perf_counter() - began, recorded


def measure(model, method: str, batches: list[dict]) -> dict:
    """The method's columns."""
    import torch

    from sparse_unsloth import attach, detach, get_state
    from sparse_unsloth.bench.checks import check, plain_steps
    from sparse_unsloth.bench.methods import sparsity_of

    plain = plain_steps(model)  # anew: the method before has trained it
    with tempfile.TemporaryDirectory() as folder:
        sparsity = sparsity_of(method, model.config.num_hidden_layers, str(Path(folder) / "estimator.safetensors"))
        if sparsity is not None:
            attach(model, sparsity)
            state = get_state(model)
            state.begin_training(driver="benchmark", max_steps=1_000_000)
            state.set_step(0)
        try:
            print(f"{method}: {check(model, method, plain)}", flush=True)
            graphs = None if sparsity is None else state.graphs
            if graphs is not None:
                graphs.clear()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
            rounds = [round_of(model, batches, optimiser, graphs) for _ in range(ROUNDS)]
            peak = torch.cuda.max_memory_allocated() + (0 if graphs is None else graphs.memory())
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            return {
                "recording_s": round(rounds[-2][0] - rounds[-1][0], 3), "round_s": round(rounds[-1][0], 3),
                "recorded_share": round(rounds[-1][1] / len(batches), 3),
                "kinds": 0 if graphs is None else len(graphs.kinds), "peak_gib": round(peak / 2**30, 3),
                "used_gib": round((total - free) / 2**30, 3),
            }  # fmt: skip
        finally:
            if sparsity is not None:
                detach(model)


def append(path: Path, row: dict) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/mixed"))
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--layouts", default="flat,padded")
    parser.add_argument("--documents", type=int, default=4, help="in each micro-batch")
    parser.add_argument("--steps", type=int, default=24, help="of a round")
    args = parser.parse_args(argv)
    args.rank, args.checkpointing = 16, "unsloth"
    args.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from sparse_unsloth.bench.models import load_model

    model = load_model(args, "unsloth", LONGEST)
    from sparse_unsloth.bench.speed import describe

    common = describe(args)
    for layout in args.layouts.split(","):
        batches = make_batches(layout, args.documents, args.steps, model.config.vocab_size)
        tokens = sum(int((batch["attention_mask"] if layout == "padded" else batch["packed_seq_lengths"]).sum())
                     for batch in batches)  # fmt: skip
        for method in args.methods.split(","):
            found = measure(model, method, batches)
            row = common | {
                "layout": layout, "method": method, "documents": args.documents, "steps": args.steps, "tokens": tokens
            } | found  # fmt: skip
            append(args.out / "mixed_lengths.csv", {name: row.get(name, "") for name in COLUMNS})
            print(
                f"{layout:7} {method:17} {1000 * found['round_s'] / args.steps:7.1f} ms a step, "
                f"{tokens / found['round_s']:6.0f} tokens/s, {found['recorded_share']:.0%} replayed of "
                f"{found['kinds']} kinds, recorded in {found['recording_s']:.1f} s, peak {found['peak_gib']:.2f} GiB, "
                f"in use {found['used_gib']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
