"""Reads the table of `benchmarks.end_to_end`: ratios, Markdown, pictures of the speed and of the losses."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from sparse_unsloth.bench.table import Kind, read_table, write_table
from sparse_unsloth.errors import ConfigError

COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "data", "micro_batch", "arm", "tokens_per_s", "total_s",
    "busy_share", "peak_gib", "final_loss", "steps", "warmup_steps", "over_stock", "over_best_arm", "best_arm", "run",
    "note",
)  # fmt: skip
CASE = "model", "dtype", "data", "micro_batch", "steps", "warmup_steps"
CELLS = Kind(COLUMNS, CASE, "tokens_per_s", lambda row: 1000 / float(row["tokens_per_s"]))
ONE = "1x1"
"""The micro-batch of long documents."""
STOCKS = "unsloth-stock", "peft"
"""What ``over_stock`` refers to: the first of these that the run has."""


def losses_path(table: Path) -> Path:
    return table.with_name(f"{table.stem}-losses.jsonl")


def is_ours(row: Mapping[str, str]) -> bool:
    return row["arm"].startswith("ours-")


def fill_ratios(path: Path) -> None:
    """Writes the ratios to the stock arm and to the best arm, at the same case in the same run."""
    rows, groups = read_table(path, COLUMNS), defaultdict(list)
    for row in rows:
        if row["tokens_per_s"]:
            groups[tuple(row[name] for name in ("run", *CASE))].append(row)
    for group in groups.values():
        speeds = {row["arm"]: float(row["tokens_per_s"]) for row in group if not is_ours(row)}
        stock = next((arm for arm in STOCKS if arm in speeds), None)
        best = max(speeds, key=speeds.__getitem__, default="")
        for row in group:
            speed = float(row["tokens_per_s"])
            row["over_stock"] = f"{speed / speeds[stock]:.3f}" if stock else ""
            row["over_best_arm"], row["best_arm"] = f"{speed / speeds[best]:.3f}" if best else "", best
    if rows:
        write_table(path, rows, COLUMNS)


def table(path: Path, run: str = "") -> str:
    """Formats a run, the newest by default, a row for each cell.

    *Best of all* is the speed over the best arm at any micro-batch of the same data: users may choose that too.

    Raises:
        ConfigError: the table has no such run.
    """
    rows, run = rows_of_run(path, run)
    best = defaultdict(float)
    for row in rows:
        if row["tokens_per_s"] and not is_ours(row):
            case = row["model"], row["dtype"], row["data"]
            best[case] = max(best[case], float(row["tokens_per_s"]))
    heading = (
        "model", "data", "micro-batch", "arm", "tokens/s", "over stock", "over best arm", "best arm", "best of all",
        "kernels run", "peak GiB", "final loss", "total s", "note",
    )  # fmt: skip
    first = rows[0]
    lines = [
        f"Run {run}: {first['device']}, commit {first['commit']}, {first['versions']}; {first['steps']} steps, "
        f"{first['warmup_steps']} of them warm up",
        "",
    ]
    lines += [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    order = {key: at for at, key in enumerate(dict.fromkeys(tuple(row[name] for name in CASE) for row in rows))}
    for row in sorted(rows, key=lambda row: (order[tuple(row[name] for name in CASE)], is_ours(row))):
        speed, top = row["tokens_per_s"], best[row["model"], row["dtype"], row["data"]]
        cells = [f"{row['model']} {row['dtype']}", row["data"], row["micro_batch"], row["arm"]]
        cells += [f"{float(speed):.0f}" if speed else ""]
        cells += [f"{float(row[name]):.2f}x" if row[name] else "" for name in ("over_stock", "over_best_arm")]
        cells += [row["best_arm"], f"{float(speed) / top:.2f}x" if speed and top else ""]
        cells += [f"{float(row['busy_share']):.0%}" if row["busy_share"] else "", row["peak_gib"], row["final_loss"]]
        cells += [row["total_s"], row["note"].replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rows_of_run(path: Path, run: str) -> tuple[list[dict], str]:
    """Returns the rows of a run, the newest by default, and its name; a cell that was trained again counts once."""
    rows = read_table(path, COLUMNS)
    run = run or (rows[-1]["run"] if rows else "")
    rows = [row for row in rows if row["run"] == run]
    if not rows:
        raise ConfigError(f"{path} has no run {run}".rstrip())
    return list({tuple(row[name] for name in (*CASE, "arm")): row for row in rows}.values()), run


def plot(path: Path, run: str = "") -> list[Path]:
    """Draws tokens/s by data, and the loss of every arm at each step; returns the pictures, beside the table."""
    from matplotlib.figure import Figure

    rows, run = rows_of_run(path, run)
    rows = [row for row in rows if row["tokens_per_s"]]
    arms = list(dict.fromkeys(row["arm"] for row in sorted(rows, key=is_ours)))
    colours = {arm: f"C{at}" for at, arm in enumerate(arms)}
    groups = defaultdict(list)
    for row in rows:
        groups[row["model"], row["dtype"], "" if row["micro_batch"] == ONE else row["micro_batch"]].append(row)
    speeds = Figure(figsize=(10, 3.4 * len(groups)), layout="constrained")
    for axes, (key, group) in zip(speeds.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
        kinds = list(dict.fromkeys(row["data"] for row in group))
        width = 0.8 / len(arms)
        for at, arm in enumerate(arms):
            chosen = [row for row in group if row["arm"] == arm]
            places = [kinds.index(row["data"]) + (at - (len(arms) - 1) / 2) * width for row in chosen]
            heights = [float(row["tokens_per_s"]) for row in chosen]
            axes.bar_label(axes.bar(places, heights, width, label=arm, color=colours[arm]), fmt="%.0f", fontsize=6)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(ylabel="tokens a second", title=f"{rows[0]['device']}, {' '.join(key)}".rstrip())
        axes.legend(fontsize="x-small", bbox_to_anchor=(1, 1), loc="upper left")
    curves = defaultdict(dict)
    for line in losses_path(path).read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if found["run"] == run:
            curves[tuple(found[name] for name in CASE[:4])][found["arm"]] = found["losses"]
    losses = Figure(figsize=(10, 3.0 * len(curves)), layout="constrained")
    for axes, (key, by_arm) in zip(losses.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True):
        for arm, values in by_arm.items():
            style = "solid" if arm.startswith("ours-") else "dashed"
            axes.plot(range(1, len(values) + 1), values, label=arm, color=colours.get(arm), linestyle=style)
        axes.set(xlabel="step", ylabel="loss", title=" ".join(key))
        axes.legend(fontsize="x-small", bbox_to_anchor=(1, 1), loc="upper left")
    pictures = path.with_suffix(".png"), path.with_name(f"{path.stem}-losses.png")
    for figure, picture in zip((speeds, losses), pictures, strict=True):
        figure.savefig(picture, dpi=120)
    return list(pictures)
