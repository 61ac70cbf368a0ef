"""Reports the quickstart's figures as a table in the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_unsloth.data.smollm2 import SMOLLM2

COLOURS = ("tab:blue", "tab:orange", "tab:green")
SMOOTHING = 5


def title(results: dict[str, Any]) -> str:
    """Returns the report's title."""
    first, second, *_ = results["runs"]
    if first == "stock":  # on a GPU
        first = f"stock {results['backend']}"
    model = "SmolLM2-135M-Instruct" if results["model"] == SMOLLM2 else results["model"].rpartition("/")[2]
    return f"{model}, LoRA on seven projections: {first} against {second}"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the table's heading and rows as text."""
    runs, before = results["runs"], results["before"]
    first, second, *_ = runs
    in_pairs = {first: 1.0, second: results["pairs"]["median"]}

    def line(label: str, form: str, pick, start: str = "") -> list[str]:
        values = [pick(run) for run in runs.values()]
        return [label, start, *("-" if value is None else form.format(value) for value in values)]

    def held_out(label: str, form: str, name: str) -> list[str]:
        return line(label, form, lambda run: run["evaluation"][name], form.format(before[name]))

    table = [
        line("steps (sparse ones)", "{}", lambda run: f"{run['steps']} ({sum(run['step_is_sparse'])})"),
        line("training loss, last tenth", "{:.3f}", lambda run: run["train_loss"]),
        held_out("answer loss, held out", "{:.3f}", "answer_loss"),
        held_out("token accuracy, held out", "{:.1%}", "token_accuracy"),
        held_out("exact match, held out", "{:.1%}", "exact_match"),
        line("step, median s", "{:.2f}", lambda run: run["median_step_seconds"]),
        ["speed, median of pairs", "", *_speeds(runs, in_pairs)],
        line("steps in all, s", "{:.0f}", lambda run: sum(run["step_seconds"])),
        line("context share of tokens", "{:.1%}", lambda run: run["context_share"]),
        line("padding share of batches", "{:.1%}", lambda run: run["padding_share"]),
    ]
    if "flops" in runs[first]:
        table += [
            line("FLOPs, 10^12", "{:.1f}", lambda run: run["flops"] / 1e12),
            line("FLOPs, of the dense run's", "{:.0%}", lambda run: run["flops"] / runs[first]["flops"]),
        ]
    return ["", "before", *runs], table


def notes(results: dict[str, Any]) -> list[str]:
    """Returns notes that explain the table, in one or two sentences each."""
    lines, pairs, (first, second, *_) = [], results["pairs"], results["runs"]
    if pairs["median"] is not None:
        saved = ""
        if "sparse_step_flops" in results:
            saved = (
                f" and takes {results['sparse_step_flops']:.0%} of its FLOPs "
                f"({results['sparse_step_flops_without_padding']:.0%} if neither computed padding)"
            )
        lines += [
            f"A step of the {second} run is {pairs['median']:.2f} times as fast as the {first} run's on the same batch "
            f"(median of {len(pairs['speed'])} pairs, each right after the other in one process){saved}.",
            pairs["verdict"],
        ]
    if "flops" in results["runs"][first]:
        lines += [
            "FLOPs are counted as computed: plain TRL pads to the longest sample of a batch; a dense step computes "
            "that padding, a sparse MLP leaves it out (and so does the backward pass of `backward_rows`).",
            "Equal cost: a dense run with its own full learning-rate schedule that stops at the sparse run's FLOPs, "
            "calibration included. A sparse run is worth having where it beats that one.",
        ]
    answers = results["before"]["answers"]
    lines += [
        f"Held out: {answers} questions that do not occur in training, answered by the dense forward; one answer is "
        f"{1 / answers:.1%} of exact match. One seed: small differences mean nothing.",
        f"Same initial adapter: {_yes(results['same_initial_adapter'])}. "
        f"Same batches in the same order: {_yes(results['same_batches'])}.",
        _machine(results),
    ]
    return lines


def terminal_table(results: dict[str, Any]):
    """Returns the table and its notes for ``rich``."""
    from rich.console import Group
    from rich.table import Table

    heading, body = rows(results)
    table = Table(title=title(results))
    for index, name in enumerate(heading):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    return Group(table, *notes(results))


def markdown(results: dict[str, Any]) -> str:
    """Returns the text of `results.md`: table, notes and picture."""
    heading, body = rows(results)
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    lines += [
        "",
        *(f"- {note}" for note in notes(results)),
        "",
        "![Loss, and the times of paired steps](quickstart.png)",
    ]
    return f"# {title(results)}\n\n" + "\n".join(lines) + "\n"


def save_report(results: dict[str, Any], folder: Path) -> None:
    """Writes ``results.json``, ``results.md`` and ``quickstart.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "quickstart.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the loss over the FLOPs spent (on a GPU: the time), and the seconds of the paired steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, time = figure.subplots(1, 2)
    counted = all("flops" in run for run in results["runs"].values())
    for colour, (name, run) in zip(COLOURS, results["runs"].items(), strict=False):
        steps = [count / 1e12 for count in run["flops_by_step"]] if counted else run["step_seconds"]
        spent = _cumulated(steps, run["calibration_flops"] / 1e12 if counted else run["setup_seconds"])
        loss.plot(spent, _smooth(run["losses"]), color=colour, label=f"{name}, training")
        loss.plot(spent[-1], run["evaluation"]["answer_loss"], "o", color=colour)
    loss.plot([], [], "o", color="grey", label="held-out answers, at the end")
    spent = "FLOPs spent, 10^12" if counted else "seconds, set-up included"
    loss.set(xlabel=spent, ylabel="loss, nats a token", yscale="log", title="Loss")
    for axis_formatter in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        axis_formatter(StrMethodFormatter("{x:g}"))
    loss.legend(fontsize="small")
    _draw_pairs(time, results)
    figure.savefig(path, dpi=120)


def _draw_pairs(axes, results: dict[str, Any]) -> None:
    """Draws each step's seconds in both runs, joined by a line."""
    names = list(results["runs"])[:2]
    seconds = [results["runs"][name]["step_seconds"] for name in names]
    steps = range(1, len(seconds[0]) + 1)
    axes.vlines(steps, *seconds, color="lightgrey", zorder=0)
    for colour, name, values in zip(COLOURS, names, seconds, strict=False):
        axes.plot(steps, values, ".", markersize=8, color=colour, label=f"{name} run")
    median = results["pairs"]["median"]
    found = "" if median is None else f": {median:.2f} times as fast (median)"
    axes.set(xlabel="optimiser step", ylabel="seconds", title=f"Times of a step in pairs{found}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _speeds(runs: dict[str, Any], known: dict[str, float | None]) -> list[str]:
    """Returns each run's speed over the dense step on the same batch; only the first two were paired."""
    return ["-" if known.get(name) is None else f"{known[name]:.2f}x" for name in runs]


def _machine(results: dict[str, Any]) -> str:
    environment, names = results["environment"], ["torch", "transformers", "trl", "peft"]
    where = f"{environment['processor']}, {environment['torch_threads']} threads, float32"
    if "flops" not in next(iter(results["runs"].values())):
        where, names = f"{', '.join(environment['gpus'])}, 4-bit weights", [*names, "unsloth"]
    packages = ", ".join(f"{name} {environment['packages'].get(name, 'not installed')}" for name in names)
    return f"{where}; {packages}; the whole quickstart took {results['seconds'] / 60:.1f} minutes."


def _cumulated(values: list[float], start: float) -> list[float]:
    total, sums = start, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def _smooth(values: list[float]) -> list[float]:
    """Returns running means over the last steps."""
    windows = [values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
