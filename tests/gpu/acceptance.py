"""Everything that only a GPU shows, in one command of less than eight minutes; exit code 1 on any failure.

    python tests/gpu/acceptance.py --out benchmarks/results/acceptance        (or: make test-gpu)

The six families of Unsloth's fast path, three of its compiled path, and twice as many with the PEFT backend, as small
random models, in 16 and 4 bits, with each kind of gradient checkpointing, padded, padding-free and packed, and one pass
of a random Llama-3-8B; dense, rows and channels, with and without CUDA graphs (`sparse_unsloth.bench.trial`).
Of dtypes, checkpointing and layouts every other combination is tried, and all with --full, which takes twice as long.
Each family runs in a process of its own, several at a time. With --keep-attention checkpointed layers keep attention
(`sparse_unsloth.ops.kept_attention`), and a promised layer that does not is a failure. The table and all trials go to
``OUT/unsloth-VERSION.md`` and ``.jsonl``, with ``--backend peft`` to ``OUT/peft-VERSION.md`` and ``.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_unsloth.bench.families import COMPILED, families_of, write_models
from sparse_unsloth.bench.trial import MODES, Trial, combinations, parse
from sparse_unsloth.utils.environment import version_of

PROMISED = families_of("unsloth")
"""Families of Unsloth's fast path whose layers run whole and are captured, but for the last one, which skips unused
rows."""
PROMISED_PEFT = families_of("peft")
"""Families whose layers run whole and are captured, likewise, with the PEFT backend."""
PEFT_LAYOUTS = ("--layouts", "padded,packed")
"""To PEFT a padding-free batch is a packed one: position ids alone tell its documents."""
FAST_MODEL = {
    "granite": ("--dtypes", "4bit", "--checkpointing", "unsloth,True"),
    "smollm3": ("--dtypes", "bf16", "--checkpointing", "unsloth,False"),
    "gemma3 eager": ("--dtypes", "bf16", "--checkpointing", "unsloth,False", "--attention", "eager"),
    "gemma3": ("--dtypes", "4bit", "--checkpointing", "unsloth", "--modes", "dense,rows,channels"),
}
"""What is tried on Unsloth's compiled path, whose layers run whole like the PEFT backend's. Gemma 3 has flex attention
there, which no CUDA graph holds; "eager" means PyTorch's attention."""
FLEX = "FastModel gemma3"
"""The process with flex attention, whose layers may run part by part."""
NO_KERNEL = "gemma2 unsloth", "gemma2-eager peft"
"""Families and backends whose attention has a soft cap, in plain PyTorch: nothing of it can be kept."""
LARGE = "llama 8B"
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
SECONDS = 460
"""For all processes together."""
AT_ONCE = 14
"""Processes that run at a time."""


def processes(folder: Path, backends: Sequence[str], large: bool) -> dict[str, list[str]]:
    """The arguments of each process's trials, by what it tries, in the order of their start: the longest first."""
    words = {}
    if "unsloth" in backends:
        families = sorted(families_of("unsloth"), key=lambda family: family != "gemma2")
        words = {
            f"{family} {dtype}": ["--backend", "unsloth", "--families", family, "--dtypes", dtype]
            for family in families
            for dtype in ("bf16", "4bit")
        }
        compiled = {
            f"FastModel {name}": ["--backend", "unsloth", "--families", name.split()[0], *PEFT_LAYOUTS, *options]
            for name, options in FAST_MODEL.items()
        }
        words = compiled | words
        if large:
            words[LARGE] = [
                "--backend", "unsloth", "--families", "llama", "--dtypes", "4bit", "--checkpointing", "unsloth",
                "--layouts", "padded,padding-free",
            ]  # fmt: skip
    if "peft" in backends:
        words |= {
            f"PEFT {family}": ["--backend", "peft", "--families", family, *PEFT_LAYOUTS]
            for family in families_of("peft")
        }
    for name, given in words.items():
        models = folder / ("large" if name == LARGE else given[1])
        given += ["--models", str(models), "--out", str(folder / f"{name}.jsonl")]
    return words


def why_failed(name: str, trial: Trial, keeps: bool = False) -> str:
    """What is wrong with a trial, "" for nothing.

    Graphs may be refused for families whose layers do not run as a whole.

    Args:
        keeps: checkpointed layers should keep attention.
    """
    if trial.verdict == "failed":
        return trial.detail
    families = PROMISED_PEFT if trial.backend == "peft" else (*PROMISED, *COMPILED)
    promised = name == LARGE or (trial.family in families and name != FLEX)
    graphs = trial.mode.endswith("graphs")
    if trial.verdict == "refused":
        return "" if graphs and not promised and "can be captured" in trial.detail else trial.detail
    if promised and (graphs or trial.mode in ("rows", "channels")):
        if trial.whole < trial.layers - 1:
            return f"{trial.whole} of {trial.layers} layers run as a whole: {trial.detail}"
        if graphs and trial.captured < trial.layers - 1:
            return f"{trial.captured} of {trial.layers} layers captured: {trial.detail}"
        kernel = f"{trial.family} {trial.backend}" not in NO_KERNEL and trial.checkpointing != "False"
        if keeps and kernel and trial.attention_kept < trial.layers - 1:
            return f"{trial.attention_kept} of {trial.layers} layers keep attention"
    return ""


def table(
    outcomes: dict[str, list[Trial]], expected: dict[str, int], head: list[str], keeps: bool = False
) -> tuple[str, int]:
    """Markdown, and how many trials failed or are missing; ``keeps`` as in `why_failed`."""
    lines, failures = [*head, "", f"| family | {' | '.join(MODES)} |", f"|---|{'---|' * len(MODES)}"], []
    for name, trials in outcomes.items():
        cells = defaultdict(list)
        for trial in trials:
            cells[trial.mode].append((trial, why_failed(name, trial, keeps)))
        words = []
        for mode in MODES:
            found = cells[mode]
            failures += [(name, trial, why) for trial, why in found if why]
            bad = sum(bool(why) for _, why in found)
            refused = sum(trial.verdict == "refused" for trial, _ in found)
            errors = [trial.gradient_error for trial, _ in found if trial.gradient_error is not None]
            errors_of_rows = [trial.rows_error for trial, _ in found if trial.rows_error is not None]
            last = found[-1][0] if found else None
            layers = ""
            if last and last.verdict == "ok" and last.whole:
                layers = f", {last.whole} of {last.layers} whole" + f", {last.captured} captured" * bool(last.captured)
            word = f"{len(found) - bad} of {len(found)}" + (" refused" if refused and not bad else "")
            word += layers + (f", {max(errors):.1e}" if errors else "")
            word += f", rows {max(errors_of_rows):.1e}" if errors_of_rows else ""
            words.append(word if found else "-")
        failures += [(name, trial, why) for trial, why in cells["plain"] if why]
        lines.append(f"| {name} | {' | '.join(words)} |")
        if len(trials) < expected[name]:
            failures.append((name, None, f"{len(trials)} of {expected[name]} trials ran"))
    reasons = Counter(
        (trial.family, trial.detail)
        for name, trials in outcomes.items()
        for trial in trials
        if trial.detail and not why_failed(name, trial, keeps)
    )
    lines += ["", "Layers that do not run whole or captured, and why:", ""]
    lines += [f"- {family}, {count} trials: {reason}" for (family, reason), count in sorted(reasons.items())]
    lines += ["", f"**{len(failures)} failures.**" if failures else "**No failures.**", ""]
    for name, trial, why in failures:
        where = "" if trial is None else f" {trial.dtype} {trial.checkpointing} {trial.layout} {trial.mode}"
        lines.append(f"- {name}{where}: {why}")
    return "\n".join(lines) + "\n", len(failures)


def count_trials(words: list[str]) -> int:
    """How many trials a process makes, if all of its plain models run."""
    args = parse(words)
    return len(combinations(args)) * len(args.families) * (len(args.modes) + 1)  # and the plain model


def start(name: str, words: list[str], folder: Path) -> subprocess.Popen:
    """Starts a process in a folder of its own: Unsloth writes its compiled modules into the working directory."""
    if name == LARGE and not (folder / "large" / "llama" / "config.json").is_file():
        write_models(folder / "large", ("llama",), device="cuda", **LLAMA_3_8B)
        torch.cuda.empty_cache()
    place = folder / f"run {name}"
    place.mkdir()
    source = str(Path(__file__).parents[2])
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }  # fmt: skip
    command = [sys.executable, "-m", "sparse_unsloth.bench.trial", *words]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_all(words: dict[str, list[str]], folder: Path, deadline: float) -> dict[str, int | None]:
    """Runs all processes, `AT_ONCE` at a time; returns their exit codes by name, None where the time was up.

    Args:
        deadline: of `time.time`.
    """
    waiting, running, codes, began = list(words), {}, {}, time.time()
    while waiting or running:
        late = time.time() > deadline
        for name, process in list(running.items()):
            if process.poll() is not None or late:
                codes[name] = process.poll()
                process.kill()
                process.wait()
                del running[name]
                print(f"{name}: exit code {codes[name]} after {time.time() - began:.0f} s", flush=True)
        if late:
            return codes | dict.fromkeys(waiting)
        for name in waiting[: AT_ONCE - len(running)]:
            running[name] = start(name, words[name], folder)
            waiting.remove(name)
        time.sleep(0.2)
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/acceptance"))
    parser.add_argument("--backend", choices=("unsloth", "peft", "both"), default="both")
    parser.add_argument("--no-large", action="store_true", help="without the pass of 8B, which takes 20 GB of disk")
    parser.add_argument("--full", action="store_true", help="every combination of dtype, checkpointing and layout")
    parser.add_argument("--keep-attention", action="store_true", help="checkpointed layers keep attention")
    parser.add_argument("--only", default="", help="processes, parted by commas: 'llama 4bit', 'PEFT llama', ...")
    parser.add_argument("--large-model", type=Path, help="folder with a checkpoint llama/; made where missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("acceptance: needs an NVIDIA GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    began = time.time()
    backends = ("unsloth", "peft") if args.backend == "both" else (args.backend,)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.large_model:
            args.large_model.mkdir(parents=True, exist_ok=True)
            (folder / "large").symlink_to(args.large_model.resolve())
        words = processes(folder, backends, large=not args.no_large)
        if args.only:
            words = {name: words[name] for name in args.only.split(",")}
        for name, given in words.items():
            given += ["--every-other"] * (not args.full and name != LARGE)
            given += ["--keep-attention"] * args.keep_attention
        for backend in backends:
            write_models(folder / backend, families_of(backend) + COMPILED * (backend == "unsloth"), backend)
        codes, outcomes = run_all(words, folder, began + args.seconds), {}
        for name in words:
            lines = folder / f"{name}.jsonl"
            text = lines.read_text().splitlines() if lines.is_file() else []
            outcomes[name] = [Trial(**json.loads(line)) for line in text]
            log = folder / f"{name}.log"
            if log.is_file() and (not text or codes[name] not in (0, 1)):
                print(f"--- {name}: exit code {codes[name]}\n{log.read_text()[-4000:]}")
    versions = {
        name: version_of(name)
        for name in ("unsloth", "unsloth_zoo", "torch", "triton", "transformers", "trl", "peft", "bitsandbytes")
    }
    of, title = backends[0], {"unsloth": "Unsloth", "peft": "PEFT"}[backends[0]]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    head = [
        f"# Acceptance with {title} {versions[of]}",
        "",
        f"{torch.cuda.get_device_name()}; {found}; {round(time.time() - began)} s. "
        f"Made by `{' '.join(['python', *sys.argv])}`.",
        "",
        "In each cell: trials that passed (dtypes x checkpointing x layouts), layers as a whole and in CUDA graphs, "
        "and the largest relative error of all gradients with nothing left out against the same model before "
        "attaching; of rows also that of gradients through a quarter of the context tokens, against the same rows by "
        "the model's own code.",
    ]
    text, failures = table(outcomes, {name: count_trials(words[name]) for name in outcomes}, head, args.keep_attention)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{of}-{versions[of]}{'-kept-attention' * args.keep_attention}"
    path.with_name(path.name + ".md").write_text(text)
    with path.with_name(path.name + ".jsonl").open("w") as lines:
        for name, trials in outcomes.items():
            lines.writelines(json.dumps({"process": name, **vars(trial)}) + "\n" for trial in trials)
    print(text, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
