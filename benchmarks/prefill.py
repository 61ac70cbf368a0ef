"""Times the prefill of a batch of prompts, dense and sparse.

    python benchmarks/prefill.py --model /tmp/llama8b --out runs/prefill            # under 90 s on one H100, 4 bits
    python benchmarks/prefill.py --model DIR --backend peft --batch 2 --length 32   # rehearsal on a CPU

A forward over prompts of random tokens fills the cache and returns the last logits, as at the start of `generate`.
Dense and sparse alternate on the same attached model. A method is timed only after its layers passed the benchmark's
equality check, and after its prefill reached every sparse part. Each method is a row of OUT/prefill.csv.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path

from sparse_unsloth.reporting.tables import append_csv
from sparse_unsloth.utils.options import real, whole

COLUMNS = (
    "date", "commit", "device", "model", "dtype", "backend", "batch", "length", "method", "dense_ms", "sparse_ms",
    "speed_up", "flop_limit", "repeats",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/prefill"))
    parser.add_argument("--backend", default="unsloth", choices=("unsloth", "peft"))
    parser.add_argument("--dtype", default="4bit", choices=("4bit", "bf16"))
    parser.add_argument("--methods", default="sparse-o2,sparse-50", help="of `sparse-unsloth bench`")
    parser.add_argument("--batch", type=whole(), default=4)
    parser.add_argument("--length", type=whole(), default=2048, help="tokens of a prompt")
    parser.add_argument("--repeats", type=whole(), default=12, help="forwards of each kind that are timed")
    parser.add_argument("--seconds", type=real(least=0), default=85.0, help="begin no method after so many")
    parser.add_argument("--commit", default="unknown", help="of the code")
    arguments = parser.parse_args()
    arguments.rank, arguments.checkpointing = 16, "False"
    began = time.perf_counter()

    from sparse_unsloth.bench.methods import methods_of
    from sparse_unsloth.bench.models import load_model

    methods = methods_of(arguments.methods)
    model = load_model(arguments, arguments.backend, arguments.length + 1)
    for method in methods:
        if time.perf_counter() - began > arguments.seconds:
            sys.exit(f"time is up before {method}; give it more with --seconds, or name it alone with --methods")
        row = measure(model, method, arguments)
        print({name: row[name] for name in COLUMNS[8:]}, flush=True)
        append_csv(arguments.out / "prefill.csv", [row], COLUMNS)


def measure(model, method: str, arguments: argparse.Namespace) -> dict:
    import torch

    from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
    from sparse_unsloth.bench.checks import check
    from sparse_unsloth.bench.methods import sparsity_of

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (arguments.batch, arguments.length), generator=generator)
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    FastSparseLanguageModel.for_training(model, False)
    attach(model, sparsity_of(method, model.config.get_text_config().num_hidden_layers))
    print(check(model, method, None), flush=True)
    state = get_state(model)

    def seconds(sparse: bool) -> float:
        FastSparseLanguageModel.for_inference(model, sparse_prefill=sparse)
        synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            model(**batch, use_cache=True, logits_to_keep=1)
        synchronize(device)
        return time.perf_counter() - start

    times = {sparse: [seconds(sparse) for _ in range(2)] for sparse in (False, True)}
    if state.warned:
        sys.exit("; ".join(sorted(state.warned)))
    times = {sparse: [] for sparse in times}
    for _ in range(arguments.repeats):
        for sparse, own in times.items():
            own.append(seconds(sparse))
    dense, ours = (1000 * statistics.median(times[sparse]) for sparse in (False, True))
    limit = flop_limit(model, state.layer_sparsity, arguments)
    detach(model)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model": Path(arguments.model).name,
        "method": method,
        "dense_ms": round(dense, 2),
        "sparse_ms": round(ours, 2),
        "speed_up": round(dense / ours, 3),
        "flop_limit": round(limit, 3),
        **{name: getattr(arguments, name) for name in ("commit", "dtype", "backend", "batch", "length", "repeats")},
    }


def flop_limit(model, layer_sparsity, arguments: argparse.Namespace) -> float:
    """Returns the speed-up that the FLOPs of a forward allow; both sides compute the last logits only."""
    from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops

    shape, batch, length = ModelShape.from_config(model.config), arguments.batch, arguments.length
    options = {"seq_lengths": [length] * batch, "lora_rank": arguments.rank, "head_tokens": batch}
    dense = step_flops(shape, [(0.0, 0.0)] * shape.num_layers, TrainingStep(batch * length, 0, **options))
    ours = step_flops(shape, layer_sparsity, TrainingStep(batch, batch * (length - 1), estimator_rank=8, **options))
    return dense.forward.total / ours.forward.total


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
