"""Draws the table of ``long_sequence.py`` (its ``--draw``): ``long_sequence.md`` and ``.png``, from the newest rows.

The text of ``long_sequence-notes.md`` beside the CSV, if there is one, precedes the table.
"""

from __future__ import annotations

from pathlib import Path

DENSE = "unsloth-dense"
COLORS = {DENSE: "C0", "sparse-o2": "C1", "rows-25": "C2"}


def newest(rows: list[dict]) -> dict[tuple, dict]:
    """Selects the last row of each cell, by (tiled, layout, checkpointing, method, tokens)."""
    cells: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        tokens = 0 if row["layout"] == "longest" else row["tokens"]
        cells[row["tiled"], row["layout"], row["checkpointing"], row["method"], tokens] = row
    return dict(sorted(cells.items()))


def baseline(cells: dict[tuple, dict], key: tuple) -> dict | None:
    """Finds dense Unsloth at the same layout and length; ``budget`` is compared with Unsloth's checkpointing."""
    tiled, layout, mode, _, tokens = key
    row = cells.get((tiled, layout, "unsloth" if mode == "budget" else mode, DENSE, tokens))
    return row if row is not None and row["median_ms"] else None


def markdown(rows: list[dict], notes: str = "") -> str:
    cells = newest(rows)
    first = rows[-1]
    commits = list(dict.fromkeys(row["commit"] for row in cells.values()))
    lines = [
        "# Long sequences",
        "",
        f"{first['device']}, {first['model']}, {first['dtype']}; commit {' and '.join(commits)}, {first['versions']}.",
        "Speed-up and memory are against dense Unsloth at the same layout, length and checkpointing, for `budget` with",
        "every layer checkpointed; with a star where dense was measured at another commit, on another machine.",
        "Made by `benchmarks/long_sequence.py --draw`.",
        "",
        *([notes.strip(), ""] if notes else []),
        "![Tokens a second and peak memory](long_sequence.png)",
        "",
        "| layout | tokens | checkpointing | tiled MLP | method | ms | tokens/s | speed-up | peak GiB | memory | |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {' | '.join(_cells(row, baseline(cells, key)))} |" for key, row in cells.items()]
    lines += ["", "In rows `longest` the speed-up is the ratio of the lengths."]
    return "\n".join(lines) + "\n"


def _cells(row: dict, dense: dict | None) -> tuple[str, ...]:
    took, faster, memory = row["median_ms"], "", ""
    if took and dense is not None and row["method"] != DENSE:
        lengths, longest = row["tokens"] / dense["tokens"], row["layout"] == "longest"
        faster = f"{lengths if longest else lengths * dense['median_ms'] / took:.2f}x"
        if dense["peak_gib"] and not longest:
            memory = f"{row['peak_gib'] / dense['peak_gib']:.2f}x"
        faster += "*" * (row["commit"] != dense["commit"])
    return (
        row["layout"],
        str(row["tokens"]),
        row["checkpointing"],
        "yes" if row["tiled"] == "True" else "no",
        row["method"],
        f"{took:.0f}" if took else "",
        f"{row['tokens'] / took * 1000:.0f}" if took else "",
        faster,
        f"{row['peak_gib']:.1f}" if took else "",
        memory,
        row["outcome"],
    )


def draw(rows: list[dict], path: Path) -> None:
    """Draws tokens per second and peak memory over the length, a line for each method and mode."""
    from matplotlib.figure import Figure

    lines: dict[tuple, list[dict]] = {}
    for (tiled, layout, mode, method, _), row in newest(rows).items():
        if row["median_ms"] and layout != "longest":
            lines.setdefault((layout, mode, tiled, method), []).append(row)
    layouts = [name for name in ("single", "packed") if any(key[0] == name for key in lines)]
    figure = Figure(figsize=(6 * max(len(layouts), 1) + 3, 7), layout="constrained")
    axes = figure.subplots(2, max(len(layouts), 1), squeeze=False)
    for column, layout in enumerate(layouts):
        for (where, mode, tiled, method), of in lines.items():
            if where != layout:
                continue
            label = f"{method}, {mode}" + (", tiled" if tiled == "True" else "")
            looks = {
                "linestyle": {"unsloth": "-", "budget": "--", "none": ":"}[mode],
                "color": COLORS.get(method, "C3"),
                "marker": "x" if tiled == "True" else "o",
                "label": label,
            }
            of = sorted(of, key=lambda row: row["tokens"])
            tokens = [row["tokens"] / 1024 for row in of]
            axes[0][column].plot(tokens, [row["tokens"] / row["median_ms"] * 1000 for row in of], **looks)
            axes[1][column].plot(tokens, [row["peak_gib"] for row in of], **looks)
        axes[0][column].set(title=f"{layout} documents", ylabel="tokens/s", ylim=(0, None))
        axes[1][column].set(xlabel="tokens a step, thousands (1024)", ylabel="peak GiB", ylim=(0, None))
        for row in axes:
            row[column].set_xscale("log", base=2)
    named = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def main(path: Path, rows: list[dict]) -> None:
    notes = path.with_name(f"{path.stem}-notes.md")
    text = markdown(rows, notes.read_text(encoding="utf-8") if notes.exists() else "")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, path.with_suffix(".png"))
