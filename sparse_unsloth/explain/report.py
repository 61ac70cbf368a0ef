"""Reports the records of a run: a summary, a table by layer, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.explain.records import ENERGY, FIGURES, LABELS, parts, read, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE, PICTURE_FILE = "explain.md", "explain.png"
TITLES = {
    "captured": "energy captured, of the oracle's",
    "overlap": "channels kept from the step before",
    ENERGY: "share of the gradient's energy",
}
UNSTABLE, POOR = 0.5, 0.7
"""Shares below which the summary gives advice."""


def write(folder: Path, out: Path | None = None) -> str:
    """Writes report and picture of the run in ``folder`` into ``out`` (None: ``folder``); returns the report.

    Raises:
        ConfigError: the folder has no records.
    """
    records = read(folder)
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(records)
    (out / REPORT_FILE).write_text(text, encoding="utf-8")
    draw(records, out / PICTURE_FILE)
    return text


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The summary, one sentence or more per line."""
    last = records[-1]
    lines = [f"{len(records)} records, steps {records[0]['step']} to {last['step']}."]
    if counted := _with_flops(records):
        lines[0] += (
            f" {_mean(counted, 'context_share'):.1%} of the tokens are context; a sparse forward leaves out "
            f"{_mean(counted, 'saved_flops'):.1%} of the layers' frozen-weight matmuls."
        )
    for part in parts(records):
        sentences = []
        for metric in FIGURES:
            found = layer_means(records, part, metric)
            if found:
                worst = min(found, key=found.get)
                mean = sum(found.values()) / len(found)
                sentences.append(f"{TITLES[metric]} {mean:.1%} (least: layer {worst}, {found[worst]:.1%})")
        lines.append(f"{LABELS[part]}: {'; '.join(sentences)}.")
    lines += _advice(records)
    return lines


def layer_means(records: Sequence[Mapping[str, Any]], part: str, metric: str) -> dict[int, float]:
    """One figure of one part by layer, averaged over the records that have it."""
    found: dict[int, list[float]] = {}
    for record in records:
        for layer, value in values(record, part, metric).items():
            found.setdefault(layer, []).append(value)
    return {layer: sum(of) / len(of) for layer, of in sorted(found.items())}


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The report: summary, table by layer, picture."""
    lines = ["# What sparsity did", "", *(f"- {line}" for line in summary(records)), ""]
    present = parts(records)
    columns = [(part, metric) for part in present for metric in (*FIGURES, "saved_flops")]
    table = {column: layer_means(records, *column) for column in columns}
    columns = [column for column in columns if table[column]]
    short = {"captured": "captured", "overlap": "kept", "saved_flops": "saved", ENERGY: "energy"}
    heading = ["layer", *(f"{LABELS[part]}: {short[metric]}" for part, metric in columns)]
    lines += [f"| {' | '.join(heading)} |", f"|{' ---: |' * len(heading)}"]
    for layer in sorted({layer for column in columns for layer in table[column]}):
        cells = [f"{table[column][layer]:.1%}" if layer in table[column] else "" for column in columns]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means over the records. *captured*: energy of the selected channels over that of as many best ones, on up to "
        "1024 rows of the batch, first tokens left out (attention: mean of query-key and value channels). *kept*: "
        "the share of the channels that the step before had selected too, with another batch. *saved*: share of the "
        "part's frozen-weight matmuls, over all tokens, that a sparse forward leaves out. *energy*: the sum of squares "
        "of the gradient of the layer's output in the rows that its backward pass goes through, over that of all rows, "
        "in the micro-batches since the log line before.",
        "",
        f"![By layer and by step]({PICTURE_FILE})",
    ]
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the figures by layer (above) and by step (below)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counted = _with_flops(records)
    shown = [metric for metric in FIGURES if any(layer_means(records, part, metric) for part in parts(records))]
    panels = len(shown) + (2 if counted else 1)
    height = -(-panels // 2)
    figure = Figure(figsize=(11, 3.2 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(height, 2, squeeze=False).flatten())
    for metric in shown:
        _draw_layers(next(axes), records, metric)
    _draw_steps(next(axes), records)
    if counted:
        savings = next(axes)
        for name, label in (("context_share", "context tokens"), ("saved_flops", "frozen-weight matmuls left out")):
            savings.plot([r["step"] for r in counted], [r[name] for r in counted], marker=".", label=label)
        savings.set(xlabel="optimiser step", ylim=(0, 1.05), title="share of tokens and FLOPs")
        savings.legend(fontsize="small")
    for unused in axes:
        unused.remove()
    figure.savefig(path, dpi=110)


def _draw_steps(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws the means over the layers by step."""
    for part in parts(records):
        for metric, style in (("captured", "-"), ("overlap", "--"), (ENERGY, "-")):
            of = {r["step"]: values(r, part, metric) for r in records}
            line = {step: sum(found.values()) / len(found) for step, found in of.items() if found}
            if line:
                axes.plot(list(line), list(line.values()), style, marker=".", label=f"{LABELS[part]}, {metric}")
    axes.set(xlabel="optimiser step", ylim=(0, 1.05), title="mean over the layers")
    axes.legend(fontsize="small")


def _draw_layers(axes: Axes, records: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draws the mean over the records, and the band from the least to the greatest."""
    for part in parts(records):
        found = layer_means(records, part, metric)
        if not found:
            continue
        every = [values(record, part, metric) for record in records]
        low, high = ([pick(of[layer] for of in every if layer in of) for layer in found] for pick in (min, max))
        (line,) = axes.plot(list(found), list(found.values()), marker=".", label=LABELS[part])
        axes.fill_between(list(found), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="layer", ylim=(0, 1.05), title=TITLES[metric])
    axes.legend(fontsize="small", loc="lower right")


def _advice(records: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for part in parts(records):
        poor = [str(layer) for layer, share in layer_means(records, part, "captured").items() if share < POOR]
        if poor:
            lines.append(
                f"{LABELS[part]}: less than {POOR:.0%} of the oracle's energy in layers {', '.join(poor)}. "
                "Calibrate the estimator on your own data (kind prior), or make them less sparse."
            )
        shifting = [str(layer) for layer, share in layer_means(records, part, "overlap").items() if share < UNSTABLE]
        if shifting:
            lines.append(
                f"{LABELS[part]}: more than half of the channels are new in every step in layers "
                f"{', '.join(shifting)}: a selection made before this batch would be stale."
            )
    return lines


def _with_flops(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of channel sparsity, which tell what it left out."""
    return [record for record in records if "saved_flops" in record]


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)
