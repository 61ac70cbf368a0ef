"""Measures time and memory of `calibrate` on a model of full size, such as a random-weight Llama-3-8B in 4 bits.

    python benchmarks/calibrate.py --model DIR --out OUT [--load-in-4bit] [--seconds 560]

Weights and tokens are random: seconds and bytes are those of any model of that size, losses mean nothing. Counts and
levels are the command's (32 samples for the estimator, 96 to measure recipes on, 16 of them for single parts, 96 held
out). The script ends after --seconds, loading included. A second start with the same arguments resumes from
OUT/calibration, and adds its time to OUT/times.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path

from sparse_unsloth.utils.options import real, whole

BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", default="unsloth", choices=("unsloth", "peft"))
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--length", type=whole(), default=512, help="tokens of a sample")
    parser.add_argument("--outputs", type=whole(), default=128, help="of these, with loss")
    parser.add_argument("--samples", type=whole(0), nargs=3, default=(32, 96, 96), help="estimator, recipes, held out")
    parser.add_argument("--part-samples", type=whole(), default=16)
    parser.add_argument("--budget", type=real(above=0, below=1), default=0.5)
    parser.add_argument("--seconds", type=whole(), default=560)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.backend == "unsloth":
        importlib.import_module("unsloth")  # first, as it asks
    import torch

    from sparse_unsloth import FastSparseLanguageModel, calibrate, detach
    from sparse_unsloth.autosparsity.report import save, summary
    from sparse_unsloth.bench.shapes import Shape, make_batch

    cuda = torch.cuda.is_available()
    model, _ = FastSparseLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.length,
        dtype=torch.bfloat16 if cuda else torch.float32,
        load_in_4bit=arguments.load_in_4bit,
        backend=arguments.backend,
    )
    model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16, sparsity="dense")
    detach(model)
    loaded = time.perf_counter() - began
    print(f"loaded in {loaded:.1f} s", flush=True)
    device = str(next(model.parameters()).device)
    shape = Shape(BATCH, arguments.length, arguments.outputs)
    batches, seed = [], 0
    for count in arguments.samples:
        seeds = range(seed, seed + -(-count // BATCH))
        batches.append([make_batch(shape, model.config.vocab_size, number, device) for number in seeds])
        seed = seeds.stop
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    arguments.out.mkdir(parents=True, exist_ok=True)
    times = arguments.out / "times.json"
    earlier = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {"seconds": 0.0}
    begun, finished = time.perf_counter(), False
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(max(1, round(arguments.seconds - (begun - began))))
    try:
        result = calibrate(
            model,
            batches[0],
            probe_samples=batches[1],
            held_out=batches[2],
            budget=arguments.budget,
            part_batches=-(-arguments.part_samples // BATCH),
            output_dir=arguments.out / "calibration",
        )
        signal.alarm(0)
        finished = True
        save(result, arguments.out / "report", "random tokens")
        print("\n".join(f"- {line}" for line in summary(result)))
    except TimeoutError:
        print("time is up; start again to go on", flush=True)
    figures = {
        "finished": finished,
        "seconds": round(earlier["seconds"] + time.perf_counter() - begun, 1),
        "starts": earlier.get("starts", 0) + 1,
        "loading_seconds": round(loaded, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "tokens_of_a_batch": shape.tokens,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }
    times.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)
    return int(not finished)


def _stop(*_) -> None:
    raise TimeoutError


if __name__ == "__main__":
    sys.exit(main())
