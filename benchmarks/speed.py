"""Step times of dense Unsloth and of ours, side by side: the same process, model, batches and optimiser.

    python benchmarks/speed.py --model DIR --dtype 4bit --methods unsloth-dense,sparse-o1,sparse-o2 --shapes all

One step is forward, backward and a fused AdamW step over the LoRA weights, in bf16 autocast as trainers run it. Each
method is attached to the same loaded model, warmed up, and timed with CUDA events; a sparse method whose layers do not
equal their masked reference is not timed. Rows are appended to ``benchmarks/results/speed.csv``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "speed.csv"
COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "checkpointing", "shape", "method", "tokens", "median_ms",
    "p20_ms", "p80_ms", "peak_gib",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``length`` tokens, the last ``outputs`` of each bearing loss."""

    batch: int
    length: int
    outputs: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SHAPES = {
    "math10k": Shape(16, 512, 128),
    "codefeedback": Shape(8, 1024, 512),
    "wizardlm": Shape(4, 2048, 512),
    "csr170k": Shape(16, 512, 3),
    "long8k": Shape(1, 8192, 1024),
    "long16k": Shape(1, 16384, 1024),
}


def sparsity_of(method: str, num_layers: int) -> dict | None:
    """The configuration of a method; None for the dense baseline."""
    common = {"start_step": 0, "end_step": 1.0, "estimator": {"kind": "svd", "rank": 8}}
    if method == "unsloth-dense":
        return None
    if method == "unsloth-dense-exact":
        return {"preset": "dense"}
    if method == "hooks-dense":  # every hook installed, in a dense phase: what sparsity costs while it is off
        return {**common, "preset": "o2", "end_step": 0, "exact_removal": False}
    if method in ("sparse-o1", "sparse-o2"):
        return {"preset": method.removeprefix("sparse-"), **common}
    if method in ("sparse-50", "sparse-25"):
        return {"mlp": {f"1-{num_layers - 1}": 1 - int(method[-2:]) / 100}, **common}
    if method == "nothing-dropped":
        return {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}, **common}
    raise SystemExit(f"unknown method {method!r}")


def make_batch(shape: Shape, vocab_size: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocab_size, (shape.batch, shape.length), generator=generator)
    labels = ids.clone()
    labels[:, : shape.length - shape.outputs] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


class Stepper:
    """One training step after another on fresh batches."""

    def __init__(self, model, shape: Shape):
        self.model, self.shape, self.count = model, shape, 0
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self) -> float:
        """Milliseconds of the step."""
        self.count += 1
        batch = make_batch(self.shape, self.model.config.vocab_size, self.count, "cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        end.record()
        torch.cuda.synchronize()
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()}")
        return start.elapsed_time(end)


def check_layers(model) -> None:
    """Two sparse layers against their masked reference, on random inputs; raises if they differ.

    Only these rows are timed: a fast wrong layer is worth nothing.
    """
    from sparse_unsloth import get_state
    from sparse_unsloth.functions.mlp import GatedMlp, masked_mlp, sparse_mlp
    from sparse_unsloth.layers import MLP_PROJECTIONS
    from sparse_unsloth.partition import TokenPartition
    from sparse_unsloth.weights import read_projection

    state = get_state(model)
    for runtime in [runtime for runtime in state.runtimes.values() if runtime.sparsity.mlp > 0][:2]:
        layer = runtime.layer
        projections = [read_projection(getattr(layer.mlp, name)) for name in MLP_PROJECTIONS]
        mlp = GatedMlp(*projections, layer.activation)
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(1, 256, layer.hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16)
        labels = torch.full((1, 256), -100, device="cuda")
        labels[:, 200:] = 1
        partition = TokenPartition.from_labels(labels)
        channels = state.selector.mlp(layer, x[0, :199], runtime.sparsity.mlp).channels
        outcomes = []
        for function in (sparse_mlp, masked_mlp):
            source = x.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = function(source, partition, channels, mlp)
            loras = [tensor for projection in projections for tensor in (projection.lora.A, projection.lora.B)]
            outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), [source, *loras])])
        for ours, masked in zip(*outcomes, strict=True):
            error = ((ours - masked).float().norm() / masked.float().norm().clamp_min(1e-6)).item()
            if not error < 0.03:
                raise SystemExit(f"{layer.name}: sparse and masked layer differ by {error:.3f}; nothing was timed")


def measure(model, method: str, shapes: list[str], warmup: int, steps: int) -> list[dict]:
    from sparse_unsloth import attach, detach, get_state

    sparsity = sparsity_of(method, model.config.num_hidden_layers)
    if sparsity is not None:
        began = time.perf_counter()
        print(attach(model, sparsity), f"\n  attached in {time.perf_counter() - began:.1f} s", flush=True)
        check_layers(model)
        get_state(model).begin_training(driver="benchmark", max_steps=1_000_000)
        get_state(model).set_step(0)
    rows = []
    for name in shapes:
        gc.collect()
        torch.cuda.empty_cache()
        stepper = Stepper(model, SHAPES[name])
        for _ in range(warmup):
            stepper()
        torch.cuda.reset_peak_memory_stats()
        times = torch.tensor([stepper() for _ in range(steps)])
        p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{method:16} {name:13} {median:8.1f} ms  ({p20:.1f} to {p80:.1f})  peak {peak:.2f} GiB", flush=True)
        rows.append({"shape": name, "method": method, "tokens": SHAPES[name].tokens, "median_ms": round(median, 2),
                     "p20_ms": round(p20, 2), "p80_ms": round(p80, 2), "peak_gib": round(peak, 3)})  # fmt: skip
    if sparsity is not None:
        detach(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit")
    parser.add_argument("--methods", default="unsloth-dense,sparse-o1,sparse-o2")
    parser.add_argument("--shapes", default="all", help=f"all, or some of {', '.join(SHAPES)}")
    parser.add_argument("--checkpointing", choices=("unsloth", "True", "False"), default="unsloth")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of each method")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    checkpointing = {"unsloth": "unsloth", "True": True, "False": False}[args.checkpointing]
    shapes = list(SHAPES) if args.shapes == "all" else args.shapes.split(",")

    import unsloth  # noqa: F401  (first, as it asks)

    from sparse_unsloth import FastSparseLanguageModel

    model, _ = FastSparseLanguageModel.from_pretrained(
        args.model,
        max_seq_length=16384,
        dtype=torch.bfloat16,
        load_in_4bit=args.dtype == "4bit",
        backend="unsloth",
        use_gradient_checkpointing=checkpointing,
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=args.rank, use_gradient_checkpointing=checkpointing, sparsity="dense"
    )
    model.train()
    from sparse_unsloth import detach

    detach(model)
    rows = []
    for method in args.methods.split(","):
        rows += measure(model, method, shapes, args.warmup, args.steps)
        if args.profile:
            profile(model, method, shapes[0])
    write(args, rows)
    report(rows)


def profile(model, method: str, shape: str) -> None:
    from sparse_unsloth import attach, detach, get_state

    sparsity = sparsity_of(method, model.config.num_hidden_layers)
    if sparsity is not None:
        attach(model, sparsity)
        get_state(model).begin_training(driver="benchmark", max_steps=1_000_000)
        get_state(model).set_step(0)
    stepper = Stepper(model, SHAPES[shape])
    for _ in range(2):
        stepper()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        elapsed = stepper()
    if sparsity is not None:
        detach(model)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total, count = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = (total + event.device_time, count + 1)
    copies = sum(total for name, (total, _) in kernels.items() if name.startswith("Memcpy")) / 1000
    busy = sum(total for total, _ in kernels.values()) / 1000 - copies
    launches = sum(count for _, count in kernels.values())
    print(f"-- {method} {shape}: step {elapsed:.1f}, kernels {busy:.1f}, copies {copies:.1f} ms in {launches} launches")
    for name, (total, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:28]:
        print(f"   {total / 1000:8.2f} ms {count:6d}  {name[:110]}")


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ("torch", "triton", "transformers", "unsloth", "bitsandbytes")
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in packages)
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)


def report(rows: list[dict]) -> None:
    """Ratios against the dense baseline of this run."""
    dense = {row["shape"]: row for row in rows if row["method"] == "unsloth-dense"}
    for row in rows:
        if row["shape"] in dense and row["method"] != "unsloth-dense":
            base = dense[row["shape"]]
            speed, memory = base["median_ms"] / row["median_ms"], row["peak_gib"] / base["peak_gib"]
            print(
                f"{row['method']:16} {row['shape']:13} {speed:.2f}x the speed, {memory:.2f}x the peak memory of dense"
            )


if __name__ == "__main__":
    main()
