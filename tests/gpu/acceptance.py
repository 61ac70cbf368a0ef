"""Everything that only a GPU shows, in one command of less than eight minutes; exit code 1 on any failure.

    python tests/gpu/acceptance.py --out benchmarks/results/acceptance        (or: make test-gpu)

The six families of Unsloth's fast path as small random models, in 16 and 4 bits, with each kind of gradient
checkpointing, padded, padding-free and packed, and one pass of a random Llama-3-8B; dense, rows and channels, with and
without CUDA graphs (`sparse_unsloth.bench.trial`). Each family runs in a process of its own, several at a time. The
table and all trials go to ``OUT/unsloth-VERSION.md`` and ``.jsonl``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

from sparse_unsloth.bench.trial import FAMILIES, LAYOUTS, MODES, Trial, write_models

CAPTURED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers run as a whole and are captured, but for the last one, which leaves out rows without loss."""
LARGE = "llama 8B"
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
SECONDS = 460
"""For all processes together."""


def processes(folder: Path, large: bool) -> dict[str, list[str]]:
    """The command of each process, by what it tries."""
    small = {
        f"{family} {dtype}": ["--families", family, "--models", str(folder / "models"), "--dtypes", dtype]
        for family in FAMILIES
        for dtype in ("bf16", "4bit")
    }
    if large:
        small[LARGE] = [
            "--families", "llama", "--models", str(folder / "large"), "--dtypes", "4bit", "--checkpointing", "unsloth",
            "--layouts", "padded,padding-free",
        ]  # fmt: skip
    head = [sys.executable, "-m", "sparse_unsloth.bench.trial", "--backend", "unsloth", "--out"]
    commands = {name: [*head, str(folder / f"{name}.jsonl"), *words] for name, words in small.items()}
    head[4] = "peft"
    peft = ["--families", "llama,gemma2", "--models", str(folder / "models"), "--checkpointing", "True,False"]
    commands["PEFT"] = [*head, str(folder / "PEFT.jsonl"), *peft, "--modes", "dense,rows,channels"]
    return commands


def why_failed(name: str, trial: Trial) -> str:
    """What is wrong with a trial, "" for nothing.

    Graphs may be refused for families whose layers do not run as a whole, and capture nothing without checkpointing.
    """
    if trial.verdict == "failed":
        return trial.detail
    promised = name == LARGE or trial.family in CAPTURED
    graphs = trial.mode.endswith("graphs")
    if trial.verdict == "refused":
        return "" if graphs and not promised and "can be captured" in trial.detail else trial.detail
    if trial.backend == "unsloth" and promised and (graphs or trial.mode in ("rows", "channels")):
        if trial.whole < trial.layers - 1:
            return f"{trial.whole} of {trial.layers} layers run as a whole: {trial.detail}"
        if graphs and trial.checkpointing != "False" and trial.captured < trial.layers - 1:
            return f"{trial.captured} of {trial.layers} layers captured: {trial.detail}"
    return ""


def table(outcomes: dict[str, list[Trial]], expected: dict[str, int], head: list[str]) -> tuple[str, int]:
    """Markdown, and how many trials failed or are missing."""
    lines, failures = [*head, "", f"| family | {' | '.join(MODES)} |", f"|---|{'---|' * len(MODES)}"], []
    for name, trials in outcomes.items():
        cells = defaultdict(list)
        for trial in trials:
            cells[trial.mode].append((trial, why_failed(name, trial)))
        words = []
        for mode in MODES:
            found = cells[mode]
            failures += [(name, trial, why) for trial, why in found if why]
            bad = sum(bool(why) for _, why in found)
            refused = sum(trial.verdict == "refused" for trial, _ in found)
            errors = [trial.gradient_error for trial, _ in found if trial.gradient_error is not None]
            last = found[-1][0] if found else None
            layers = ""
            if last and last.verdict == "ok" and last.whole:
                layers = f", {last.whole} of {last.layers} whole" + f", {last.captured} captured" * bool(last.captured)
            word = f"{len(found) - bad} of {len(found)}" + (" refused" if refused and not bad else "")
            words.append(f"{word}{layers}" + (f", {max(errors):.1e}" if errors else "") if found else "-")
        failures += [(name, trial, why) for trial, why in cells["plain"] if why]
        lines.append(f"| {name} | {' | '.join(words)} |")
        if len(trials) < expected[name]:
            failures.append((name, None, f"{len(trials)} of {expected[name]} trials ran"))
    reasons = Counter(
        (trial.family, trial.detail)
        for name, trials in outcomes.items()
        for trial in trials
        if trial.detail and not why_failed(name, trial)
    )
    lines += ["", "Layers that do not run whole or captured, and why:", ""]
    lines += [f"- {family}, {count} trials: {reason}" for (family, reason), count in sorted(reasons.items())]
    lines += ["", f"**{len(failures)} failures.**" if failures else "**No failures.**", ""]
    for name, trial, why in failures:
        where = "" if trial is None else f" {trial.dtype} {trial.checkpointing} {trial.layout} {trial.mode}"
        lines.append(f"- {name}{where}: {why}")
    return "\n".join(lines) + "\n", len(failures)


def count_trials(command: list[str]) -> int:
    """How many trials a command makes, if all of its plain models run."""
    given = dict(zip(command[3::2], command[4::2], strict=True))
    counts = {"--families": "", "--dtypes": "bf16,4bit", "--checkpointing": "unsloth,True,False"}
    counts |= {"--layouts": ",".join(LAYOUTS), "--modes": ",".join(MODES)}
    total = 1
    for name, default in counts.items():
        total *= len(given.get(name, default).split(",")) + (name == "--modes")  # and the plain model
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/acceptance"))
    parser.add_argument("--no-large", action="store_true", help="without the pass of 8B, which takes 20 GB of disk")
    parser.add_argument("--only", default="", help="processes, parted by commas: 'llama 4bit', PEFT, 'llama 8B', ...")
    parser.add_argument("--large-model", type=Path, help="folder with a checkpoint llama/; made where missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("acceptance: needs an NVIDIA GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.large_model:
            (folder / "large").symlink_to(args.large_model.resolve())
        commands = processes(folder, large=not args.no_large)
        if args.only:
            commands = {name: commands[name] for name in args.only.split(",")}
        write_models(folder / "models")
        running = {}
        for one in sorted(commands, key=lambda name: name == LARGE):  # its checkpoint is made while the others load
            if one == LARGE and not (folder / "large" / "llama" / "config.json").is_file():
                write_models(folder / "large", ("llama",), "cuda", **LLAMA_3_8B)
                torch.cuda.empty_cache()
            place = folder / f"run {one}"
            place.mkdir()  # Unsloth writes its compiled modules into the working directory
            source = str(Path(__file__).parents[2])
            environment = {
                **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}",
                "TORCHINDUCTOR_COMPILE_THREADS": "4",
            }  # fmt: skip
            log = (folder / f"{one}.log").open("w")
            running[one] = subprocess.Popen(
                commands[one], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        outcomes, ends = {}, {}
        for one, process in running.items():
            try:
                process.wait(timeout=max(1.0, args.seconds - (time.time() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
            ends[one] = round(time.time() - began)
            lines = folder / f"{one}.jsonl"
            text = lines.read_text().splitlines() if lines.is_file() else []
            outcomes[one] = [Trial(**json.loads(line)) for line in text]
            if not text or process.returncode not in (0, 1):
                print(f"--- {one}: exit code {process.returncode}\n{(folder / f'{one}.log').read_text()[-4000:]}")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("unsloth", "unsloth_zoo", "torch", "triton", "transformers", "trl", "peft", "bitsandbytes")
    }
    head = [
        f"# Acceptance with Unsloth {versions['unsloth']}",
        "",
        f"{torch.cuda.get_device_name()}; {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{round(time.time() - began)} s. Made by `python tests/gpu/acceptance.py`.",
        "",
        "In each cell: trials that passed (dtypes x checkpointing x layouts), layers as a whole and in CUDA graphs, "
        "and the largest relative error of all gradients with nothing left out against the same model before "
        "attaching.",
    ]
    text, failures = table(outcomes, {name: count_trials(commands[name]) for name in outcomes}, head)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"unsloth-{versions['unsloth']}"
    path.with_name(path.name + ".md").write_text(text)
    with path.with_name(path.name + ".jsonl").open("w") as lines:
        for name, trials in outcomes.items():
            lines.writelines(json.dumps({"process": name, **vars(trial)}) + "\n" for trial in trials)
    print(text, "seconds:", ends, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
