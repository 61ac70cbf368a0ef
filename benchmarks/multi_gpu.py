"""Times training steps on several GPUs of one host: data parallel against one GPU at the same batch per GPU, and FSDP2.

    python benchmarks/multi_gpu.py --model /tmp/llama8b --small /tmp/llama8 --out runs/multi-gpu --seconds 440

``ddp``: Unsloth, 4-bit, one whole model on each GPU (torchrun). In one launch rank 0 is timed alone, the other GPUs
idle, then all together; efficiency is the time alone over the time together. ``fsdp2`` and ``fsdp2-4bit``: the PEFT
backend with ``recipes/accelerate/fsdp2.yaml`` on a smaller model, in 16 and in 4 bits, dense phase and sparse phase.
Rows are written to ``multi_gpu.csv`` in the output folder as they are measured; cells beyond the seconds are left out
and named. ``--cpu`` rehearses everything with gloo (PEFT backend only; tiny models and shapes).

    python benchmarks/multi_gpu.py --draw benchmarks/results/multi_gpu.csv      # the table beside it
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

from sparse_unsloth.reporting.tables import append_csv
from sparse_unsloth.utils.options import real, whole

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "checkpointing", "engine", "method", "shape", "gpus",
    "tokens", "median_ms", "p20_ms", "p80_ms", "peak_gib",
)  # fmt: skip
ENGINES = ("ddp", "fsdp2", "fsdp2-4bit")
METHODS = ("unsloth-dense", "sparse-o2")
SPARSE_STEP = 1000
"""Of the schedule under FSDP2: dense before, sparse from here on."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint for ddp")
    parser.add_argument("--small", help="checkpoint for fsdp2; default: that of ddp")
    parser.add_argument("--out", type=Path, default=Path("runs/multi-gpu"))
    parser.add_argument("--gpus", type=whole(), default=2)
    parser.add_argument("--shapes", default="wizardlm,math10k")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--warmup", type=whole(0), default=3)
    parser.add_argument("--steps", type=whole(), default=8)
    parser.add_argument("--seconds", type=real(least=0), default=440, help="of everything")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--draw", type=Path, help="only write the table of this file")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.dtype, args.rank = "bf16" if args.cpu or args.worker == "fsdp2" else "4bit", 16
    args.checkpointing = "True" if args.cpu or args.worker != "ddp" else "unsloth"
    return args


def launch(args: argparse.Namespace, argv: list[str]) -> int:
    """Launches each engine separately, within the time limit."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, failed = time.time() + args.seconds, 0
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    for engine in args.engines.split(","):
        if time.time() > deadline - 60 and not args.cpu:
            print(f"{engine}: left out, {deadline - time.time():.0f} s are not enough", flush=True)
            continue
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
        if engine != "ddp":
            config = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
            launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(args.gpus)]
        words = [str(Path(__file__)), *argv, "--worker", engine, "--deadline", str(deadline)]
        try:
            code = subprocess.run(
                [sys.executable, *launcher, *words], env=environment, timeout=max(deadline - time.time(), 1)
            ).returncode
        except subprocess.TimeoutExpired:
            code = "stopped, out of time"
        print(f"{engine}: {'done' if code == 0 else code}", flush=True)
        failed += code != 0
    if (args.out / "multi_gpu.csv").exists():
        print(table(args.out / "multi_gpu.csv"))
    return int(failed > 0)


class Worker:
    """The work of every rank: the same cells in the same order; rank 0 decides when to stop and writes the rows."""

    def __init__(self, args: argparse.Namespace):
        import torch
        import torch.distributed as dist

        from sparse_unsloth.bench.shapes import shapes_of

        self.args, self.torch, self.dist = args, torch, dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        args.shapes = shapes_of(args.shapes)

    def goes_on(self) -> bool:
        """Whether rank 0 still has time for another cell."""
        flag = [time.time() < self.args.deadline - 15]
        self.dist.broadcast_object_list(flag, src=0)
        return flag[0]

    def time(self, step, method: str, name: str, gpus: int) -> None:
        """Times a cell on this rank; rank 0's row counts (the ranks of a step wait for each other)."""
        from sparse_unsloth.bench.speed import quantiles

        torch = self.torch
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for _ in range(self.args.warmup):
            step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = [step() for _ in range(self.args.steps)]
        if self.rank:
            return
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        middle, low, high = quantiles(times)
        print(f"{self.args.worker:10} {method:14} {name:12} {gpus} GPU  {middle:8.1f} ms  {peak:.2f} GiB", flush=True)
        self.write(method, name, gpus, (middle, low, high), peak)

    def write(self, method: str, name: str, gpus: int, times, peak: float) -> None:
        row = {
            **self.common, "engine": self.args.worker, "method": method, "shape": name, "gpus": gpus,
            "tokens": self.args.shapes[name].tokens, "peak_gib": round(peak, 3),
            **dict(zip(("median_ms", "p20_ms", "p80_ms"), (round(value, 2) for value in times), strict=True)),
        }  # fmt: skip
        append_csv(self.args.out / "multi_gpu.csv", [row], COLUMNS)

    @property
    def common(self) -> dict[str, str]:
        import datetime

        from sparse_unsloth.bench.speed import describe

        self.args.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if self.torch.cuda.is_available():
            return describe(self.args)
        return dict.fromkeys(COLUMNS[:7], "cpu")


def work_ddp(args: argparse.Namespace) -> None:
    """Times rank 0 alone, then all ranks through DDP; dense and sparse on the same loaded model."""
    if not args.cpu:
        import unsloth  # noqa: F401  # first, as it asks
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from sparse_unsloth import attach, detach, get_state
    from sparse_unsloth.bench.checks import check
    from sparse_unsloth.bench.methods import sparsity_of
    from sparse_unsloth.bench.models import load_model
    from sparse_unsloth.bench.speed import Stepper

    local = int(os.environ["LOCAL_RANK"])
    if args.cpu:
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    worker = Worker(args)
    longest = max(2048, *(shape.length for shape in args.shapes.values()))
    model = load_model(args, "peft" if args.cpu else "unsloth", longest)
    for method in METHODS:
        sparsity = sparsity_of(method, model.config.num_hidden_layers)
        if sparsity is not None:
            report = attach(model, sparsity)
            get_state(model).begin_training(driver="benchmark", max_steps=1_000_000)
            get_state(model).set_step(0)
            if worker.rank == 0 and not args.cpu:
                print(f"{report}\n{check(model, method, None)}", flush=True)
        for name, shape in args.shapes.items():
            if not worker.goes_on():
                break
            if worker.rank == 0:
                worker.time(Stepper(model, shape), method, name, 1)
            dist.barrier()
            wrapped = DistributedDataParallel(model, device_ids=None if args.cpu else [local])
            worker.time(Stepper(model, shape, wrapped, seed=10_000 * worker.rank), method, name, worker.size)
            check_equal_parameters(model, worker.rank)
            del wrapped
            dist.barrier()
        if sparsity is not None:
            detach(model)
    dist.destroy_process_group()


def check_equal_parameters(model, rank: int) -> None:
    """Raises RuntimeError unless all ranks hold the same adapters after training on different batches."""
    import torch
    import torch.distributed as dist

    mine = torch.stack([p.detach().double().sum() for p in model.parameters() if p.requires_grad])
    first = mine.clone()
    dist.broadcast(first, src=0)
    if not torch.equal(mine, first):
        raise RuntimeError(f"rank {rank} holds other adapters than rank 0")


def work_fsdp2(args: argparse.Namespace) -> None:
    """Times the PEFT backend under FSDP2, in a dense and a sparse phase of one schedule."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator, DistributedType, PartialState
    from torch.distributed.tensor import DTensor

    from sparse_unsloth import FastSparseLanguageModel, get_state
    from sparse_unsloth.bench.methods import sparsity_of
    from sparse_unsloth.bench.shapes import make_batch

    if args.cpu:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(mixed_precision="bf16", cpu=args.cpu)
    worker = Worker(args)
    options = {}
    if args.worker == "fsdp2-4bit":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    args.model = args.small or args.model
    longest = max(2048, *(shape.length for shape in args.shapes.values()))
    model, _ = FastSparseLanguageModel.from_pretrained(
        args.model, longest, torch.bfloat16, args.worker == "fsdp2-4bit", backend="peft",
        use_gradient_checkpointing=True, **options,
    )  # fmt: skip
    sparsity = sparsity_of("sparse-o2", model.config.num_hidden_layers) | {"start_step": SPARSE_STEP}
    model = FastSparseLanguageModel.get_peft_model(model, r=16, sparsity=sparsity, use_gradient_checkpointing=True)
    vocabulary = model.config.vocab_size
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model, optimiser = accelerator.prepare(model.train(), optimiser)
    pieces = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    state = get_state(model)
    state.begin_training(driver="benchmark", max_steps=1_000_000)
    if worker.rank == 0:
        total = sum(1 for _ in model.parameters())
        print(f"{args.worker}: {pieces} of {total} parameters in pieces on {worker.size} ranks", flush=True)
    count = 0

    def step(shape) -> float:
        nonlocal count
        count += 1
        batch = make_batch(shape, vocabulary, 10_000 * worker.rank + count, accelerator.device)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        with accelerator.autocast():
            loss = model(**batch).loss
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        value = loss.item()  # waits for the GPU
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if value != value:
            raise RuntimeError(f"rank {worker.rank}: the loss is {value}")
        return 1000 * (time.perf_counter() - began)

    for method, at in (("peft-dense-phase", 0), ("peft-sparse-o2", SPARSE_STEP)):
        state.set_step(at)
        for name, shape in args.shapes.items():
            if worker.goes_on():
                worker.time(functools.partial(step, shape), method, name, worker.size)
        if at:
            state.verify_step()
    dist.destroy_process_group()


def table(path: Path) -> str:
    """Formats rows in Markdown: the newest row of each cell, with efficiency and speed-up."""
    with path.open(newline="", encoding="utf-8") as file:
        names = ("device", "model", "dtype", "engine", "method", "shape")
        rows = {(*(row[name] for name in names), int(row["gpus"])): row for row in csv.DictReader(file)}
    lines = [
        "| device | model | engine | method | a GPU | GPUs | ms | tokens/s | peak GiB | efficiency | over dense |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, row in rows.items():
        *common, method, shape, gpus = key
        took = float(row["median_ms"])
        alone = rows.get((*common, method, shape, 1))
        dense = {"sparse-o2": "unsloth-dense", "peft-sparse-o2": "peft-dense-phase"}.get(method)
        dense = rows.get((*common, dense, shape, gpus))
        efficiency = f"{float(alone['median_ms']) / took:.1%}" if alone and gpus > 1 else ""
        speedup = f"{float(dense['median_ms']) / took:.2f}x" if dense else ""
        rate = gpus * int(row["tokens"]) / took * 1000
        lines.append(
            f"| {row['device']} | {row['model']} {row['dtype']} | {row['engine']} | {method} | {shape} | {gpus} | "
            f"{took:.1f} | {rate:.0f} | {float(row['peak_gib']):.2f} | {efficiency} | {speedup} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.draw is not None:
        args.draw.with_suffix(".md").write_text(
            "# Several GPUs\n\nMade by `benchmarks/multi_gpu.py --draw`. Efficiency: the step of one GPU alone over "
            "that of all together, at the same batch a GPU.\n\n" + table(args.draw) + "\n",
            encoding="utf-8",
        )
        return 0
    if args.worker is None:
        return launch(args, argv)
    (work_ddp if args.worker == "ddp" else work_fsdp2)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
