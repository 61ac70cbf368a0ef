"""Figures of the README, and the step times of the pages, are those of the committed results."""

import csv
import re
from pathlib import Path

import pytest

from sparse_unsloth.planning.decide import ROWS_GAIN

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

METHODS = {"exact": "dense-graphs", "dense": "dense-graphs", "rows": "rows-25-graphs", "`rows`": "rows-25-graphs",
           "`o2`": "sparse-o2-graphs"}  # fmt: skip
ALL_ARMS = (RESULTS / "unsloth-2026.10.9" / "speed.csv", "2026-11-30T06:24:08+00:00 vm")
CASES = {
    "four documents": (RESULTS / "mixed_lengths.csv", ALL_ARMS[1], None, "unsloth"),
    "one of 2,048": (*ALL_ARMS, "custom-2048-0.25", "unsloth"),
    "1x2048": (*ALL_ARMS, "custom-2048-0.25", "unsloth"),
    "wizardlm, 4 x 2,048, three quarters context, nothing recomputed": (
        RESULTS / "one-layer" / "speed.csv", "2026-11-30T17:47:03+00:00 vm", "wizardlm", "False"),
    **{shape: (*ALL_ARMS, shape, "unsloth") for shape in ("wizardlm", "math10k", "codefeedback")},
}  # fmt: skip
"""Where a table's row comes from, by the beginning of its label: results, run, shape, and checkpointing of ours."""
ARMS = {"padded": "padded", "no checkpointing": "no-checkpointing", "no layer checkpointed": "skip-max"}


def measured(case: str) -> list[dict[str, str]]:
    """The rows of results that a table's row with this label shows, each with its ``ms``."""
    path, run, shape, checkpointing = next(found for label, found in CASES.items() if case.startswith(label))
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == run and row.get("shape") == shape]
    for row in rows:
        row["ms"] = row["median_ms"] if shape else float(row["round_s"]) / float(row["steps"]) * 1000
    return [row for row in rows if row["arm"] or row["checkpointing"] == checkpointing]


def rounded(shown: str, *values: str | float) -> bool:
    """Whether the numbers in ``shown`` are ``values``, rounded (those in the results are rounded once already)."""
    numbers = re.findall(r"\d+(?:\.\d+)?", shown)
    return len(numbers) == len(values) and all(
        abs(float(number) - float(value)) <= 0.51 * 10.0 ** -len(number.partition(".")[2])
        for number, value in zip(numbers, values, strict=True)
    )


def wrong_figures(page: str) -> list[str]:
    """The cells of the table of step times that the results do not show."""
    lines = re.search(r"^(\|.*\| stock \|.*\n)\|.*\n((\|.*\n)+)", page, re.MULTILINE)
    heading = [cell.strip() for cell in lines[1].strip("|\n").split("|")]
    found = []
    for line in lines[2].splitlines():
        case, stock, best, *ours = (cell.strip() for cell in line.strip("|").split("|"))
        rows = measured(case)
        arms = {row["arm"]: row for row in rows if row["arm"]}
        arm = arms[ARMS[re.fullmatch(r"\d+, ([a-z ]+?)(?: \(.*\))?", best)[1]]]
        right = {stock: rounded(stock, arms["stock"]["ms"])}
        right[best] = rounded(best, arm["ms"]) and arm["over_best_arm"] == "1.000"
        for name, cell in zip(heading[3:], ours, strict=True):
            (row,) = [row for row in rows if row["method"] == METHODS[re.split(r"[, ]", name)[0]]]
            right[cell] = rounded(cell, row["ms"], row["over_stock"], row["over_best_arm"])
        found += [f"{case}: {cell}" for cell, is_right in right.items() if not is_right]
    return found


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_step_times_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert wrong_figures(text) == []
    assert len(wrong_figures(text.replace("2.59x / 1.53x", "2.69x / 1.53x"))) == 1


TRAINING = (
    r"for (\d+) steps after (\d+): `auto` reached ([\d,]+) tokens a second .*?it expected ([\d.]+)x\) in ([\d.]+) GiB, "
    r".*? reached ([\d,]+) in ([\d.]+) GiB: \[([\d.]+)x\].*? loss was higher \(([\d.]+) against ([\d.]+)\)"
)


def wrong_training(page: str) -> list[str]:
    """The figures of the README's whole training that the results do not show."""
    run = "2026-12-01T00:45:00+00:00 vm"
    with (RESULTS / "end_to_end.csv").open(newline="", encoding="utf-8") as file:
        cells = {row["arm"]: row for row in csv.DictReader(file) if row["run"] == run}
    ours, best = cells["ours-auto"], cells["unsloth-padded+no-checkpointing"]
    notes = (RESULTS / "end_to_end-notes.md").read_text(encoding="utf-8")
    expected = re.search(r"Rows were chosen for a gain of ([\d.]+)x", notes)[1]
    steps = int(ours["steps"]) - int(ours["warmup_steps"]), int(ours["warmup_steps"])
    figures = (
        *map(str, steps), ours["tokens_per_s"], expected, ours["peak_gib"], best["tokens_per_s"], best["peak_gib"],
        ours["over_best_arm"], ours["final_loss"], best["final_loss"],
    )  # fmt: skip
    shown = re.search(TRAINING, page.replace("\n", " ")).groups()
    return [one for one, value in zip(shown, figures, strict=True) if not rounded(one.replace(",", ""), value)]


def test_the_training_of_the_readme_is_that_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert wrong_training(text) == []
    for right, wrong in (("31.1 GiB", "13.1 GiB"), ("9,353", "9,853"), ("12 steps after 12", "24 steps after 12")):
        assert right in text
        assert len(wrong_training(text.replace(right, wrong))) == 1
    expected = float(re.search(r"today's would leave out none: it expected ([\d.]+)x", text.replace("\n", " "))[1])
    assert expected < ROWS_GAIN


def rows_of(folder: str, **wanted: tuple[str, ...]) -> list[dict[str, str]]:
    with (RESULTS / folder / "speed.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row[name] in value for name, value in wanted.items())]


def ends(found: list[dict[str, str]], column: str) -> tuple[float, float]:
    values = [float(row[column]) for row in found if row[column]]
    return min(values), max(values)


def claims() -> list[tuple[str, tuple[float, ...]]]:
    """What the README says outside its tables of step times: a pattern, and what was measured."""
    large = {"shape": ("wizardlm", "math10k", "codefeedback")}
    stock = rows_of("unsloth-2026.10.9", arm=("stock",), **large)
    best = rows_of("unsloth-2026.10.9", arm=("no-checkpointing", "skip-max"), **large)
    arms = {row["arm"] for row in rows_of("unsloth-2026.10.9") if row["arm"]}
    checkpointed = {"method": ("dense-graphs", "rows-25-graphs"), "checkpointing": ("unsloth",)}
    ours = [row for folder in ("unsloth-2026.10.9", "one-layer") for row in rows_of(folder, **checkpointed, **large)]
    rows = [row for row in ours if row["method"] == "rows-25-graphs"]
    dense = [
        row for row in ours if row["method"] == "dense-graphs" and row["best_arm"] in ("no-checkpointing", "skip-max")
    ]
    kept = rows_of(
        "one-layer", method=("dense-graphs", "rows-25-graphs"), checkpointing=("False",), shape=("wizardlm",)
    )
    kept_dense = [row for row in kept if row["method"] == "dense-graphs" and row["over_best_arm"]]
    trainings, alike, sizes = quality()
    return [
        (r"\(the fastest of (\w+) ways to set it up\)", (len(arms),)),
        (r"at 8,192 tokens ([\d.]+) GiB, where stock", (ends(ours, "peak_gib")[1],)),
        (r"where stock takes ([\d.]+) and the best arm", (ends(stock, "peak_gib")[1],)),
        (r"and the best arm (\d+)\.", (ends(best, "peak_gib")[0],)),
        (r"Nothing recomputed takes (\d+)\.", (ends(kept, "peak_gib")[1],)),
        (r"([\d.]+x to [\d.]+x) over stock at 8,192 tokens", ends(rows, "over_stock")),
        (r"at 8,192 tokens, in ([\d.]+ GiB against [\d.]+);", (ends(rows, "peak_gib")[1], ends(stock, "peak_gib")[1])),
        (r"([\d.]+)x over Unsloth's best arm without checkpointing", (ends(kept_dense, "over_best_arm")[1],)),
        (r"without checkpointing; ([\d.]+x to [\d.]+x) of it with", ends(dense, "over_best_arm")),
        (r"In (\w+ of \w+) trainings of two small models", (alike, trainings)),
        (r"trainings of two small models \((\d+M and \d+M)\)", sizes),
        (r"in the (\w+) as much as its cost buys", (trainings,)),
    ]  # fmt: skip


def quality() -> tuple[int, int, tuple[int, ...]]:
    """Trainings by rows that docs/benchmarks.md lists, how many of them are not set in bold, and the models' sizes."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("### What rows cost\n")[2]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| .*-\d+M \|", line)]
    rows = [row for row in rows if not row[0].startswith("DPO")]
    sizes = dict.fromkeys(int(size) for row in rows for size in re.findall(r"-(\d+)M", " ".join(row[:2])))
    return len(rows), len([row for row in rows if "**" not in "".join(row)]), tuple(sizes)


NUMERALS = {"six": 6, "eight": 8, "nine": 9, "ninth": 9}


def wrong_claims(page: str) -> list[str]:
    """The figures of the README's sentences, and of its table of gains, that the results do not show."""
    text = page.replace("\n", " ")
    found = [(re.search(pattern, text)[1], values) for pattern, values in claims()]
    in_digits = [(re.sub(r"\b[a-z]+\b", lambda word: str(NUMERALS.get(word[0], word[0])), one), values)
                 for one, values in found]  # fmt: skip
    return [shown for shown, values in in_digits if not rounded(shown, *values)]


def test_the_gains_and_memory_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert wrong_claims(text) == []
    changes = (
        ("1.3x to 1.6x", "1.3x to 1.9x"), ("stock takes 7.6", "stock takes 8.6"), ("best arm 36", "best arm 63"),
        ("fastest of six", "fastest of nine"), ("In eight of nine", "In nine of nine"),
        ("(135M and 270M)", "(135M and 720M)"),
    )  # fmt: skip
    for right, wrong in changes:
        assert right in text
        assert len(wrong_claims(text.replace(right, wrong))) == 1


FACTS = (  # figures that nobody measured: names, versions, sizes of what was run
    "Llama-3-8B sizes, 4-bit, r = 16, one H200, Unsloth 2026.10.9:", "stock at 8,192 tokens,", ": at 8,192 tokens ",
    "2 documents x 4 micro-batches a step", "`use_cpu=True, bf16=False`", "Python 3.10 or newer",
    "(`make quickstart PYTHON=python3.12`", "Unsloth 2026.10.6 and 2026.10.9 were run", "one model size (8B)",
    "8-bit bases", "TRL 1.15 cannot train: install `trl<1.15`", "Apache-2.0", "ICML 2025", "[arXiv 2506.16500]",
)  # fmt: skip


def unchecked(page: str) -> list[str]:
    """The words with a figure of the README that no test compares with the results."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- quickstart results -->.*?<!-- end of", "", text, flags=re.DOTALL)
    text = re.sub(r"^\| micro-batch \|.*\n(\|.*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("\n", " ")
    found = [re.search(pattern, text) for pattern in (TRAINING, *(pattern for pattern, _ in claims()))]
    found = [(one, group) for one in found for group in range(1, one.re.groups + 1)]
    found += [(re.search(re.escape(fact), text), 0) for fact in FACTS]
    for one, group in found:
        start, end = one.span(group)
        text = f"{text[:start]}{'_' * (end - start)}{text[end:]}"
    return [word for word in text.split() if re.search(r"\d", word)]


def test_each_figure_of_the_readme_is_checked():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert unchecked(text) == []
    assert unchecked(text.replace("## Limits\n", "## Limits\n\nIt is 2.5x faster, on 8 GPUs.\n")) == ["2.5x", "8"]
    tested = re.findall(r"unsloth>=([\d.]+),<=([\d.]+);", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "Unsloth {} and {} were run".format(*tested[0]) in text
