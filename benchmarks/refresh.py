"""What keeping channels for several steps costs: SmolLM2-135M on the quickstart's tasks, on the CPU.

    python benchmarks/refresh.py OUT [--refresh 1 4 16 1000] [--seeds 0] [--steps 32] [--seconds 3000]

Each run is the quickstart's recipe with another `refresh_steps`, and a row of OUT/refresh.csv; a run that has one is
not repeated, and none is begun after --seconds. Rows hold the energy that the channels capture while they are in use,
the training loss of sparse steps, and the answer loss on held-out questions after the dense tail (dense forward).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder, whose kernels.py would answer to transformers' `import kernels`

from sparse_unsloth.explain.records import means, read
from sparse_unsloth.quickstart import evaluate
from sparse_unsloth.recipe import load_recipe
from sparse_unsloth.train import build_trainer

FIELDS = (
    "refresh_steps", "seed", "steps", "sparsity", "captured", "overlap", "sparse_loss", "answer_loss",
    "token_accuracy", "exact_match", "sparse_step_s", "load",
)  # fmt: skip
LAST = 8
"""Sparse steps whose training loss is averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--refresh", type=int, nargs="+", default=[1, 4, 16, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--test-size", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=3000.0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    table, began = arguments.out / "refresh.csv", time.perf_counter()
    done = set()
    if table.is_file():
        with open(table, encoding="utf-8") as file:
            done = {(int(row["refresh_steps"]), int(row["seed"]), int(row["steps"])) for row in csv.DictReader(file)}
    for seed in arguments.seeds:
        for refresh in arguments.refresh:
            if (refresh, seed, arguments.steps) in done:
                continue
            if time.perf_counter() - began > arguments.seconds:
                print("time is up; start again to go on", flush=True)
                return
            row = one_run(arguments, refresh, seed)
            print(row, flush=True)
            new = not table.is_file()
            with open(table, "a", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)


def one_run(arguments: argparse.Namespace, refresh: int, seed: int) -> dict[str, object]:
    """Trains and evaluates once."""
    folder = arguments.out / f"run-{refresh}-{seed}"
    words = {
        "--output_dir": folder, "--max_steps": arguments.steps, "--dataset_test_size": arguments.test_size,
        "--do_eval": "true", "--logging_steps": 1, "--seed": 3407 + seed, "--sparsity.refresh_steps": refresh,
        "--sparsity.explain_steps": 3, "--sparsity.mlp": f'{{"1-29": {arguments.sparsity}}}',
    }  # fmt: skip
    recipe = load_recipe("quickstart", [str(word) for pair in words.items() for word in pair])
    trainer, timer = build_trainer(recipe)
    timer.start()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sparse = [loss for loss, was in zip(losses, timer.times.sparse, strict=True) if was]
    looks = [means(record) for record in read(folder)]

    def mean(name: str) -> float:
        return round(statistics.mean(look[name] for look in looks), 4)

    return {
        "refresh_steps": refresh,
        "seed": seed,
        "steps": arguments.steps,
        "sparsity": arguments.sparsity,
        "captured": mean("sparsity/captured/mlp"),
        "overlap": mean("sparsity/overlap/mlp"),
        "sparse_loss": round(statistics.mean(sparse[-LAST:]), 4),
        **{name: round(value, 4) for name, value in evaluate(trainer).items() if name in FIELDS},
        "sparse_step_s": round(timer.times.median(True), 2),
        "load": round(os.getloadavg()[1], 1),
    }


if __name__ == "__main__":
    main()
