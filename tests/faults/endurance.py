"""Thousands of training steps on a tiny model: neither memory, nor hooks, nor the time of a step may grow.

    python tests/faults/endurance.py --steps 10000 --out tests/faults/endurance.json
    python tests/faults/endurance.py --steps 10000 --rows --out tests/faults/endurance-rows.json

Sparse throughout, with gradient checkpointing, micro-batches of changing lengths, an evaluation and a dense phase in
every hundred steps (every window of a shorter run). Figures are taken in ten windows; the first one (warm-up) counts
for nothing. Exit code 1 where something grew. PYTHONPATH: tests/helpers.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.runtime.metrics import metrics

from tiny_models import always, make_batch, make_lora

WINDOWS = 10
MOST_BYTES, MOST_SLOWER = 24 << 20, 1.5
"""From the second window to the last: resident memory, and the median time of a step."""


def count_hooks(model) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def run(steps: int, rows: bool = False) -> list[dict]:
    """The figures of each window; ``rows``: with few rows in the backward pass, instead of few channels."""
    model = make_lora(num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    schedule = {"start_step": 0, "end_step": 10**9}
    attach(model, {"backward_rows": 0.25, **schedule} if rows else always(**schedule))
    state = get_state(model)
    state.begin_training("endurance", max_steps=10**9 + 1)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    windows, times, loss = [], [], 0.0
    per_window = steps // WINDOWS
    every = min(100, per_window)
    for step in range(steps):
        began = time.perf_counter()
        state.set_step(step if step % every else 10**9)  # a dense one
        batch = make_batch(step % 97, lengths=((5 + step % 7, 3 + step % 5),))
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        state.verify_step()
        times.append(time.perf_counter() - began)
        if step % every == every // 2:
            model.eval()
            with torch.no_grad():
                model(**batch)
            model.train()
            metrics(state)
        if (step + 1) % per_window == 0:
            windows.append(
                {
                    "steps": step + 1,
                    "median_step_ms": round(1000 * statistics.median(times), 3),
                    "resident_mib": round(resident() / 2**20, 1),
                    "tensors": count_tensors(),
                    "hooks": count_hooks(model),
                    "loss": round(loss.item(), 5),
                }
            )
            print(windows[-1], flush=True)
            times.clear()
    detach(model)
    return windows


def growth(windows: list[dict]) -> list[str]:
    """What grew from the second window to the last."""
    first, last = windows[1], windows[-1]
    problems = []
    for name in ("hooks", "tensors"):
        if last[name] > first[name]:
            problems.append(f"{name}: {first[name]} to {last[name]}")
    if (last["resident_mib"] - first["resident_mib"]) * 2**20 > MOST_BYTES:
        problems.append(f"memory: {first['resident_mib']} to {last['resident_mib']} MiB")
    # The fastest of the windows bears least of what else the machine does.
    early, late = (min(window["median_step_ms"] for window in part) for part in (windows[1:4], windows[-3:]))
    if late > MOST_SLOWER * early:
        problems.append(f"step: {early} to {late} ms")
    return problems


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return (
        subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or "unknown"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rows", action="store_true", help="leave out rows of the backward pass, not channels")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    windows = run(args.steps, args.rows)
    problems = growth(windows)
    result = {
        "steps": args.steps,
        "seconds": round(time.time() - began),
        "commit": commit(),
        "grew": problems,
        "windows": windows,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("nothing grew" if not problems else "; ".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
