"""Draws the table of ``sparse-unsloth bench``: reads ``speed.csv``, writes ``speed.md`` and ``speed.png`` beside it.

    python benchmarks/plot_speed.py [benchmarks/results/speed.csv]

The page shows the newest run of each device, model, dtype and checkpointing mode, with the arms of Unsloth that it
timed, so give experiments another ``--out``. The newest profile of each step (``--profile``, ``speed-profile.csv``) is
shown below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_unsloth.bench.arms import FLAT
from sparse_unsloth.bench.methods import LLAMA_3_8B, METHODS
from sparse_unsloth.bench.profiling import IDLE
from sparse_unsloth.bench.shapes import HOST, SHAPES
from sparse_unsloth.bench.table import (
    STEP,
    Comparison,
    compare,
    is_baseline,
    profile_path,
    read_profile_rows,
    read_rows,
)

RESULTS = Path(__file__).parent / "results" / "speed.csv"
MODELS = {"llama8b": LLAMA_3_8B}
"""Sizes by the name of the checkpoint's folder, for the FLOP limits."""
KEY = "device", "model", "dtype", "checkpointing"
PEFT_PAIR = "peft-dense", "peft-sparse-o2"


def newest_runs(rows: list[dict]) -> dict[tuple[str, str, str, str], list[dict]]:
    """Selects the newest run by (device, model, dtype, checkpointing), in the order of `SHAPES` and `METHODS`.

    A shape whose baseline was measured again (``--then``) is shown again from there on.
    """
    runs: dict[tuple, list[dict]] = {}
    for row in sorted((row for row in rows if not row["arm"]), key=lambda row: row["date"]):
        key = tuple(row[name] for name in KEY)
        if key not in runs or _name(runs[key][0]) != _name(row):
            runs[key] = []
        runs[key].append(row)
    shapes, methods = list(SHAPES | HOST), list(METHODS)

    def ordered(key: tuple, run: list[dict]) -> list[dict]:
        arms = [row for row in rows if row["arm"] and (row["run"], *(row[name] for name in KEY[:3]))
                == (run[0]["run"], *key[:3])]  # fmt: skip
        run = arms + run
        baselines: dict[str, int] = {}
        places = []
        for row in run:
            shape = row["shape"]
            baselines[shape] = baselines.get(shape, 0) + (is_baseline(row) and not arms)
            again = max(baselines[shape] - 1, 0)
            number = shapes.index(shape) if shape in shapes else len(shapes)
            method = methods.index(row["method"]) if row["method"] in methods else len(methods)
            places.append((number, shape, again, -1 if row["arm"] else method))
        return [run[place] for place in sorted(range(len(run)), key=places.__getitem__)]

    return {key: ordered(key, run) for key, run in sorted(runs.items())}


def _name(row: dict) -> str:
    """Returns the name of a row's run, or its date in older tables."""
    return row["run"] or row["date"]


def markdown(runs: dict[tuple, list[dict]], profiles: list[dict], picture: str = "speed.png") -> str:
    """Formats every run as a heading, a table and a line of its versions; then the profiles."""
    lines = [
        "# Step times",
        "",
        "Forward, backward and AdamW; median, with the 20th and 80th percentile. Speed-up and memory are against dense",
        "Unsloth at the same shape in the same run: its stock arm where arms were timed; *best arm* is the speed-up",
        "over the best of them. *Of limit*: speed-up over the speed-up that the FLOPs allow. PEFT methods use",
        "transformers' checkpointing where Unsloth's is named. Limits are of the present code; until 2026-11-27 rows-*",
        "without checkpointing computed the chosen rows twice. Made by `benchmarks/plot_speed.py`.",
        "",
        f"![Speed-up over dense Unsloth]({picture})",
    ]
    heading = ("shape", "arm or method", "ms", "p20 to p80", "tokens/s", "peak GiB", "memory", "speed-up", "best arm")
    heading += ("target", "limit")
    for key, run in runs.items():
        lines += ["", f"## {title(key)}", ""]
        lines += [f"| {' | '.join((*heading, 'of limit'))} |", f"| --- | --- |{' ---: |' * (len(heading) - 1)}"]
        lines += [f"| {' | '.join(_cells(one))} |" for one in compare(run, MODELS.get(key[1]))]
        lines += ["", f"{run[0]['date']}, commit {run[0]['commit']}, {run[0]['versions']}."]
        lines += _peft(run)
    return "\n".join([*lines, *_where_time_goes(profiles)]) + "\n"


def title(key: tuple[str, str, str, str]) -> str:
    device, model, dtype, checkpointing = key
    return f"{device}, {model}, {dtype}, checkpointing {checkpointing}"


def draw(runs: dict[tuple, list[dict]], path: Path) -> None:
    """Draws bars of the speed-up, a panel for each run; targets are solid lines over their bars, limits dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(runs)), layout="constrained")
    for axes, (key, run) in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs.items(), strict=True):
        shown = [one for one in compare(run, MODELS.get(key[1])) if one.speedup is not None]
        shown = [one for one in shown if not (one.row["arm"] or is_baseline(one.row) or one.row["shape"] in HOST)]
        shown = [one for one in shown if one.row["layout"] != FLAT]
        shapes = list(dict.fromkeys(one.row["shape"] for one in shown))
        methods = [name for name in METHODS if any(one.row["method"] == name for one in shown)]
        width = 0.8 / max(len(methods), 1)
        for number, method in enumerate(methods):
            ours = [one for one in shown if one.row["method"] == method]
            places = [shapes.index(one.row["shape"]) + (number - (len(methods) - 1) / 2) * width for one in ours]
            bars = axes.bar(places, [one.speedup for one in ours], width, label=method)
            axes.bar_label(bars, fmt="%.2f", fontsize="x-small")
            for place, one in zip(places, ours, strict=True):
                if one.target is not None:
                    for height, style in ((one.target, "solid"), (one.limit, "dashed")):
                        axes.hlines(height, place - width / 2, place + width / 2, "black", style)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set(ylabel="times dense Unsloth", title=title(key))
        for value, style in (("target", "solid"), ("FLOP limit", "dashed")):
            axes.plot([], [], color="black", linestyle=style, label=value)
        axes.legend(fontsize="x-small", bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(path, dpi=120)


def _where_time_goes(profiles: list[dict]) -> list[str]:
    """Formats a table for each device, model, dtype, checkpointing and shape, a column for each method's profile."""
    if not profiles:
        return []
    newest: dict[tuple, dict[str, list[dict]]] = {}
    for row in sorted(profiles, key=lambda row: row["date"]):
        methods = newest.setdefault((*(row[name] for name in KEY), row["shape"]), {})
        known = methods.get(row["method"], [])
        methods[row["method"]] = [*known, row] if known and known[0]["date"] == row["date"] else [row]
    lines = [
        "", "# Where the time goes", "",
        "Milliseconds (launches) of one step under PyTorch's profiler, sums by the kernels' names; copies run beside",
        "kernels. The whole step was timed without the profiler; *no kernel running* is what is left of it.",
    ]  # fmt: skip
    for (*key, shape), methods in sorted(newest.items()):
        known = [*(name for name in methods if name not in METHODS), *(name for name in METHODS if name in methods)]
        columns = {name: {row["kind"]: row for row in methods[name]} for name in known}
        order = dict.fromkeys(
            row["kind"] for rows in methods.values() for row in rows if row["kind"] not in (STEP, IDLE)
        )
        lines += ["", f"## {title(tuple(key))}, {shape}", "", f"| | {' | '.join(columns)} |"]
        lines += [f"| --- |{' ---: |' * len(columns)}"]
        for kind in (STEP, *order, IDLE):
            cells = [_milliseconds(found.get(kind)) for found in columns.values()]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        runs = {f"{rows[0]['date']}, commit {rows[0]['commit']}" for rows in methods.values()}
        lines += ["", f"{'; '.join(sorted(runs))}."]
    return lines


def _milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.1f}" + (f" ({row['launches']})" if row["launches"] else "")


def _cells(one: Comparison) -> tuple[str, ...]:
    row, baseline = one.row, is_baseline(one.row)
    return (
        row["shape"],
        row["arm"] or row["method"] + f" ({FLAT})" * (row["layout"] == FLAT),
        f"{row['median_ms']:.1f}",
        f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
        f"{one.tokens_per_second:.0f}",
        f"{row['peak_gib']:.2f}",
        _form(one.memory, "{:.2f}", baseline),
        _form(one.speedup, "{:.2f}x", baseline),
        _form(float(row["over_best_arm"]) if row["over_best_arm"] else None, "{:.2f}x"),
        _form(one.target, "{:.2f}x"),
        _form(one.limit, "{:.2f}x", baseline),
        _form(one.of_limit, "{:.0%}", baseline),
    )


def _form(value: float | None, form: str, blank: bool = False) -> str:
    return "" if value is None or blank else form.format(value)


def _peft(run: list[dict]) -> list[str]:
    """Formats the speed-up of the PEFT backend over dense PEFT."""
    dense, sparse = ({row["shape"]: row["median_ms"] for row in run if row["method"] == name} for name in PEFT_PAIR)
    gains = [f"{shape} {dense[shape] / sparse[shape]:.2f}x" for shape in sparse if shape in dense]
    return ["", f"PEFT backend, sparse-o2 over dense PEFT: {', '.join(gains)}."] if gains else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=RESULTS)
    table = parser.parse_args(argv).table
    runs = newest_runs(read_rows(table, arms=True))
    if not runs:
        parser.error(f"{table} has no rows yet")
    picture = table.with_suffix(".png")
    text = markdown(runs, read_profile_rows(profile_path(table)), picture.name)
    table.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(runs, picture)


if __name__ == "__main__":
    main()
