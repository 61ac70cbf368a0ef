"""Compares rank-sparse LoRA with dense LoRA: answer loss after training, and time and memory of a step.

    python benchmarks/rank.py quality --steps 300 --seeds 0 1 2      # r = 256, sparse and dense, against dense r = 64
    python benchmarks/rank.py summary DIR ...                        # of quality, from the --out of several processes
    python benchmarks/rank.py speed --model DIR --dtype 4bit         # r = 1024, sparse and dense, against dense r = 64

Each finished run is a row appended to a CSV file under --out, and is not run again. Concurrent processes need separate
folders.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth.reporting.paired_tests import compare_paired
from sparse_unsloth.reporting.tables import read_csv, write_csv
from sparse_unsloth.utils.options import real, whole

RESULTS = Path(__file__).parent / "results" / "rank"
ALPHA = 8
"""With rank-stabilised scaling, ``alpha / sqrt(r)``: the quickstart's scale 2 at r = 16, and comparable at any rank."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="train and evaluate")
    quality.add_argument("--recipe", default="quickstart", help="default: %(default)s (SmolLM2-135M)")
    quality.add_argument("--steps", type=whole(), default=300)
    quality.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    quality.add_argument("--rank", type=whole(), default=256, help="of the sparse runs (default: %(default)s)")
    quality.add_argument("--densities", type=real(above=0, most=1), nargs="+", default=[0.08, 0.15])
    quality.add_argument(
        "--baseline", type=int, nargs="+", default=[64], help="dense ranks; the first is compared with"
    )
    quality.add_argument("--warmup", type=whole(0), help="first steps, with every component (default: a fifth of them)")
    quality.add_argument(
        "--seconds", type=real(least=0), help="begin no run that would end later, by the longest so far"
    )
    quality.add_argument("overrides", nargs="*", metavar="-- --key value", help="further keys of the recipe")
    summary = commands.add_parser("summary", help="compare what several calls of quality measured")
    summary.add_argument("folders", type=Path, nargs="+")
    speed = commands.add_parser("speed", help="time steps")
    speed.add_argument("--model", required=True, help="folder or hub name")
    speed.add_argument("--backend", choices=("auto", "unsloth", "peft"), default="auto")
    speed.add_argument("--dtype", choices=("16bit", "4bit"), default="16bit")
    speed.add_argument("--rank", type=whole(), default=1024, help="of the sparse run (default: %(default)s)")
    speed.add_argument("--density", type=real(above=0, most=1), default=0.08)
    speed.add_argument(
        "--baseline", type=whole(), nargs="+", default=[64], help="dense ranks; the first is compared with"
    )
    speed.add_argument("--batch", type=whole(), default=4)
    speed.add_argument("--length", type=whole(), default=2048)
    speed.add_argument("--steps", type=whole(), default=10, help="timed steps (default: %(default)s)")
    speed.add_argument("--rounds", type=whole(), default=2, help="over all variants, against clock drift")
    for command in (quality, speed):
        command.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/rank")
    arguments = parser.parse_args(words)
    {"quality": run_quality, "summary": summarise, "speed": run_speed}[arguments.command](arguments)


def variants(arguments: argparse.Namespace) -> dict[str, tuple[int, float | None]]:
    """``(rank, density)`` by name; density None is dense."""
    densities = getattr(arguments, "densities", None) or [arguments.density]
    chosen: dict[str, tuple[int, float | None]] = {
        f"dense r={rank}": (rank, None) for rank in (*arguments.baseline, arguments.rank)
    }
    return chosen | {f"sparse r={arguments.rank} at {density}": (arguments.rank, density) for density in densities}


# -- Quality ----------------------------------------------------------------------------------------------------------


def run_quality(arguments: argparse.Namespace) -> None:
    """Trains; writes a row per run with held-out figures, by the retained components and by all components."""
    began, longest = time.perf_counter(), 0.0
    path = arguments.out / "quality.csv"
    rows: list[dict[str, Any]] = read_csv(path) if path.is_file() else []
    for seed in arguments.seeds:
        for name, (rank, density) in variants(arguments).items():
            key = {"variant": name, "seed": str(seed), "steps": str(arguments.steps), "recipe": arguments.recipe}
            if any(key.items() <= row.items() for row in rows):
                continue
            started = time.perf_counter()
            if arguments.seconds is not None and started - began + longest > arguments.seconds:
                print(f"Stopped before {name}, seed {seed}: the longest run took {longest:.0f} s. Call again to go on.")
                print_shortfall(rows)
                return
            rows.append({**key, **_train(arguments, rank, density, seed)})
            write_csv(path, rows)
            print(rows[-1], flush=True)
            longest = max(longest, time.perf_counter() - started)
    print_shortfall(rows)


def summarise(arguments: argparse.Namespace) -> None:
    print_shortfall([row for folder in arguments.folders for row in read_csv(folder / "quality.csv")])


def _train(arguments: argparse.Namespace, rank: int, density: float | None, seed: int) -> dict[str, Any]:
    from sparse_unsloth import rank as rank_sparse
    from sparse_unsloth.quickstart.run import evaluate
    from sparse_unsloth.training.recipe import load_recipe
    from sparse_unsloth.training.run import build_trainer

    words = ["--sparsity", "dense", "--max_steps", str(arguments.steps), "--seed", str(seed), "--do_eval", "true"]
    words += ["--lora_r", str(rank), "--lora_alpha", str(ALPHA), "--use_rslora", "true", *arguments.overrides]
    if density is not None:
        warmup = arguments.warmup or max(1, arguments.steps // 5)
        words += ["--rank.target_density", str(density), "--rank.warmup_steps", str(warmup)]
    trainer, timer = build_trainer(load_recipe(arguments.recipe, words))
    trainer.train()
    shipped = evaluate(trainer)
    figures = {name: shipped[name] for name in ("answer_loss", "token_accuracy", "exact_match")}
    everything, alive = "", 1.0
    if density is not None:
        layers = rank_sparse.get_rank_state(trainer.model).layers
        alive = 1 - sum(int(layer.dead.sum()) for layer in layers if layer.dead is not None) / (rank * len(layers))
        with rank_sparse.retained(trainer.model, 1):
            everything = evaluate(trainer)["answer_loss"]
    del trainer
    _free()
    return figures | {
        "answer_loss_all": everything,
        "alive_share": alive,
        "median_step_seconds": statistics.median(timer.times.seconds[1:] or timer.times.seconds),
    }


def print_shortfall(rows: list[dict[str, Any]]) -> None:
    """Prints the answer loss of each variant minus the first one's at the same seeds; positive is worse."""
    settings = dict.fromkeys((row["recipe"], row["steps"]) for row in rows)
    for setting in settings:
        of = [row for row in rows if (row["recipe"], row["steps"]) == setting]
        losses: dict[str, dict[str, float]] = {}
        for row in of:
            losses.setdefault(row["variant"], {})[row["seed"]] = float(row["answer_loss"])
        baseline, *others = losses
        print(f"{setting[0]}, {setting[1]} steps")
        print(f"{baseline}: answer loss {statistics.fmean(losses[baseline].values()):.4f}")
        for name in others:
            print(_shortfall(name, losses[name], baseline, losses[baseline]))


def _shortfall(name: str, losses: dict[str, float], baseline: str, others: dict[str, float]) -> str:
    shared = [seed for seed in losses if seed in others]
    ours, base = ([values[seed] for seed in shared] for values in (losses, others))
    if not shared:
        return f"{name}: no seed of {baseline} to compare with"
    change = statistics.fmean(ours) / statistics.fmean(base) - 1
    line = f"{name}: answer loss {statistics.fmean(ours):.4f}, {change:+.1%} against {baseline}"
    if len(shared) > 1:
        outcome = compare_paired(ours, base)
        line += f" (p = {outcome['p_value']:.3f}, d = {outcome['effect_size']:.2f}, {len(shared)} seeds)"
    return line


# -- Speed ------------------------------------------------------------------------------------------------------------


def run_speed(arguments: argparse.Namespace) -> None:
    """Times; writes a row per variant and round: median step time, peak memory, and the FLOP limit."""
    path = arguments.out / "speed.csv"
    rows: list[dict[str, Any]] = read_csv(path) if path.is_file() else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    setting = f"{arguments.model} {arguments.dtype} {arguments.batch}x{arguments.length} {arguments.backend}"
    chosen = variants(arguments)
    for number in range(arguments.rounds):
        for name, (rank, density) in chosen.items():
            key = {"variant": name, "round": str(number), "setting": setting, "device": device}
            if any(key.items() <= row.items() for row in rows):
                continue
            rows.append({**key, **_time(arguments, rank, density)})
            write_csv(path, rows)
            print(rows[-1], flush=True)
    of = [row for row in rows if row["setting"] == setting and row["device"] == device]
    median = {name: statistics.median(float(r["step_ms"]) for r in of if r["variant"] == name) for name in chosen}
    baseline, flops = next(iter(chosen)), {row["variant"]: float(row["step_flops"]) for row in of}
    bound = flops[baseline] / float(of[0]["base_flops"])
    for name, milliseconds in median.items():
        speedup = median[baseline] / milliseconds
        limit = flops[baseline] / flops[name]
        print(f"{name}: {milliseconds:.1f} ms, {speedup:.2f}x of {baseline} (by FLOPs {limit:.2f}x)")
    print(f"no LoRA at all would be {bound:.2f}x of {baseline} by FLOPs: no choice of rank components can exceed that.")


def _time(arguments: argparse.Namespace, rank: int, density: float | None) -> dict[str, Any]:
    from sparse_unsloth import FastSparseLanguageModel
    from sparse_unsloth import rank as rank_sparse

    model, _ = FastSparseLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.length,
        load_in_4bit=arguments.dtype == "4bit",
        backend=arguments.backend,
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=ALPHA, use_rslora=True, sparsity={"exact_removal": False}
    )
    if density is not None:
        state = rank_sparse.apply(model, density, warmup_steps=1)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)
    device = parameters[0].device
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.length), device=device)
    labels = ids.clone()
    labels[:, : arguments.length // 2] = -100
    seconds = []
    for step in range(3 + arguments.steps):
        if step == 3 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 3:
            seconds.append(_now(device) - began)
    base, lora = _flops(model, ids.numel(), rank if density is None else state.layers[0].kept)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else ""
    optimizer.zero_grad(set_to_none=True)
    del model, optimizer, parameters, loss
    _free()
    milliseconds = [1e3 * second for second in seconds]
    return {
        "step_ms": statistics.median(milliseconds),
        "step_ms_min": min(milliseconds),
        "step_ms_max": max(milliseconds),
        "peak_gb": peak,
        "step_flops": base + lora,
        "base_flops": base,
    }


def _flops(model: nn.Module, tokens: int, computed: int) -> tuple[float, float]:
    """``(frozen weights, LoRA)`` of one step with recompute, without attention products and the choice of components.

    A frozen weight takes part in forward, recompute and the input gradient, a LoRA factor also in its own gradient.
    """
    base = lora = 0.0
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            base += 3 * 2 * tokens * module.in_features * module.out_features
            lora += 4 * 2 * tokens * computed * (module.in_features + module.out_features)
        elif name.endswith("lm_head"):
            base += 2 * 2 * tokens * module.in_features * module.out_features
    return base, lora


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
