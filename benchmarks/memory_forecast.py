"""Compares the forecast of peak memory with every committed measurement that has one.

    python benchmarks/memory_forecast.py            (prints the table; --write: into results/memory/README.md)

The forecast is the one that `estimate` prints and by which `memory_budget` and `auto` plan (`costs.memory`). Of equal
cases the newest row counts. Left out, by name: what older code measured that stored less (`older`), and arms of Unsloth
that are no plain training. A table of end-to-end runs has no lengths of its micro-batches: of ``chat`` they are those
that `real_text` makes, scaled to the tokens of each step.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import (
    GIB,
    Forward,
    StepMemory,
    fused_logits,
    layer_activations,
    logit_bytes,
    peak_memory,
    sparse_layer_activations,
)
from sparse_unsloth.forecast.speed_table import memory_of_row
from sparse_unsloth.graphs.buckets import bucket

FOLDER = Path(__file__).parent / "results"
SPEED = ("speed.csv", "graphs/speed.csv", "graphs/dense.csv", "unsloth-2026.10.9/speed.csv", "one-layer/speed.csv")
PLAIN_ARMS = ("", "stock", "no-checkpointing", "liger")
LLAMA_1B = ModelShape(2048, 8192, 16, 32, 8, 64, 128256)
CHAT = {"padded": 1530, "flat": 1160}
"""The largest micro-batch of two documents of ``chat``, in 24 steps."""
DDP_BUCKETS = 4
"""Bytes of a trained parameter that DDP adds for its buckets."""
WITHIN = 0.15


class Case(NamedTuple):
    """One measurement: its table, what was measured, GiB measured, GiB predicted (None: why it is left out)."""

    table: str
    case: str
    shape: str
    measured: float
    predicted: float | None
    why: str = ""


def read(name: str) -> list[dict]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def version(row: Mapping) -> str:
    found = re.search(r"unsloth=(\S+)", row["versions"])
    return found[1] if found else ""


def older(row: Mapping) -> str:
    """Why a row's code is not that which is predicted; "" where it is."""
    rows = row["method"].startswith("rows-")
    if rows and row["checkpointing"] in ("False", "none", "budget") and row["date"] < "2026-11-28":
        return "older code, which stored the inputs of O and MLP alone"
    if row["method"] == "dense-graphs" and version(row) == "2026.10.6":
        return "older code, whose captured dense steps computed logits of all rows"
    return ""


def size_of(model: ModelShape, rank: int = 16, tied: bool = False) -> dict[str, int]:
    """Numbers of parameters, as `peak_memory` takes them."""
    projections = model.projections().values()
    return {
        "linear": model.num_layers * sum(inputs * outputs for inputs, outputs in projections),
        "other": model.hidden_size * ((1 if tied else 2) * model.vocab_size + 2 * model.num_layers + 1),
        "adapter": model.num_layers * rank * sum(inputs + outputs for inputs, outputs in projections),
    }


def peak(
    row: Mapping,
    sizes: int | Sequence[int],
    *,
    model: ModelShape = LLAMA_3_8B,
    labelled: int | None = None,
    captured: Sequence[int] = (),
    tied: bool = False,
    rank: int = 16,
    through: int | None = None,
    checkpointing: str = "unsloth",
    each: int | None = None,
    recomputed: float | None = None,
) -> float:
    """GiB of a training of so many tokens a micro-batch, ``labelled`` of them in the loss (None: all)."""
    sizes = [sizes] if isinstance(sizes, int) else sizes
    each = logit_bytes(version(row)) if each is None else each

    def logits(count: int) -> float:
        return fused_logits(model, min(count, -(-(labelled or count) // 128) * 128), each)

    return peak_memory(
        model,
        **size_of(model, rank, tied),
        rows=max(sizes),
        checkpointing=checkpointing,
        in_4bit=row["dtype"] == "4bit",
        logits=max(map(logits, sizes)),
        backward_rows=through,
        recomputed=recomputed,
        captured=[(one, logits(one)) for one in captured],
    ).gib()["peak"]


def of_speed() -> Iterator[Case]:
    newest = {}
    for name in SPEED:
        for row in sorted(read(name), key=lambda row: row["date"]):
            if row.get("arm", "") in PLAIN_ARMS and row["peak_gib"]:
                kind = row["dtype"], row["checkpointing"], row["method"], row["shape"]
                newest[(name, version(row), row["device"][7:11], *kind)] = row
    for (name, release, device, dtype, checkpointing, method, shape), row in newest.items():
        case = f"{release}, {device}, {dtype}, checkpointing {checkpointing}, {method}"
        predicted, why = memory_of_row(row, LLAMA_3_8B), older(row)
        if row.get("arm") == "liger":  # a fused loss without logits, which `memory_of_row` does not know
            predicted = peak(row, 8192, checkpointing="on", each=0)
        yield Case(name, case, shape, float(row["peak_gib"]), None if why else predicted, why)


def of_mixed() -> Iterator[Case]:
    from mixed_lengths import make_batches

    for row in read("mixed_lengths.csv"):
        if row["arm"] not in PLAIN_ARMS:
            continue
        batches = make_batches("flat", int(row["documents"]), int(row["steps"]), LLAMA_3_8B.vocab_size)
        sizes = [batch["input_ids"].numel() for batch in batches]
        labelled = max(int((batch["labels"] != -100).sum()) for batch in batches)
        ours, graphs = row["method"] != "unsloth-dense", row["method"].endswith("-graphs")
        few = "rows-25" in row["method"]
        predicted = peak(
            row,
            sizes,
            labelled=labelled if ours else None,
            captured=sorted({bucket(size, False) for size in sizes}) if graphs else (),
            through=labelled + (max(sizes) - labelled) // 4 if few else None,
            checkpointing="off" if "False" in row["checkpointing"] or "no-checkpointing" in row["arm"] else "unsloth",
        )
        case, why = f"{version(row)}, {row['method']}, {row['arm'] or row['checkpointing']}", older(row)
        measured = float(row["peak_gib"])
        yield Case("mixed_lengths.csv", case, f"up to {max(sizes)}", measured, None if why else predicted, why)


def of_long() -> Iterator[Case]:
    for row in read("long_sequence.csv"):
        if not float(row["peak_gib"]) or row["tiled"] == "True":
            continue
        tokens, mode = int(row["tokens"]), row["checkpointing"]
        labelled = tokens // 8 if row["layout"] != "single" else 1024
        ours = row["method"] != "unsloth-dense"
        why = older(row)
        if mode == "budget" or (mode == "none" and row["method"] == "sparse-o2"):
            predicted = of_budget(row, tokens, labelled)
        else:
            through = labelled + (tokens - labelled) // 4 if row["method"] == "rows-25" else None
            predicted = peak(
                row,
                tokens,
                labelled=labelled if ours else None,
                through=through,
                checkpointing="off" if mode == "none" else "unsloth",
                recomputed=o2_layer(tokens, labelled) if row["method"] == "sparse-o2" else None,
            )
        case = f"{version(row)}, {row['layout']}, checkpointing {mode}, {row['method']}"
        yield Case("long_sequence.csv", case, row["tokens"], float(row["peak_gib"]), None if why else predicted, why)


def o2_layer(tokens: int, labelled: int) -> float | None:
    """Bytes that a channel-sparse layer of preset o2 stores."""
    layers = SparsityConfig(preset="o2").layer_sparsity(LLAMA_3_8B.num_layers)
    return sparse_layer_activations(LLAMA_3_8B, [layer.mlp for layer in layers], tokens, labelled + 1, 16)


def of_budget(row: Mapping, tokens: int, labelled: int) -> float:
    """GiB of channel-sparse training (o2: 0.97, 0.9 or 0 of the channels left out) that keeps some layers."""
    model = LLAMA_3_8B
    found = re.search(r"(\d+) layers kept", row["outcome"])
    count = model.num_layers if found is None else int(found[1])
    needs = []
    for layer in SparsityConfig(preset="o2").layer_sparsity(model.num_layers):
        kept = round(model.intermediate_size * (1 - layer.mlp))
        dense = labelled + 1 if layer.mlp else tokens
        needs.append(layer_activations(model, tokens, dense, kept_channels=kept, lora_rank=16))
    memory = StepMemory(model, True, offloads=True)
    one = layer_activations(model, tokens, tokens)
    logits = fused_logits(model, -(-labelled // 128) * 128, logit_bytes(version(row)))
    forward = Forward(tokens, logits, sum(sorted(needs)[:count]), count, model.num_layers - count, one)
    return (weights(model) + memory.alone(forward)) / GIB


def weights(model: ModelShape) -> float:
    memory = peak_memory(model, **size_of(model), rows=0, checkpointing="unsloth", in_4bit=True)
    return memory.weights + memory.adapter


def of_several() -> Iterator[Case]:
    for row in read("multi_gpu.csv"):
        if row["engine"] != "ddp":
            yield Case("multi_gpu.csv", row["engine"], row["shape"], float(row["peak_gib"]), None, "sharded weights")
            continue
        predicted = memory_of_row({**row, "model": "llama8b"}, LLAMA_3_8B)
        if int(row["gpus"]) > 1:
            predicted += size_of(LLAMA_3_8B)["adapter"] * DDP_BUCKETS / GIB
        case = f"{version(row)}, DDP, {row['method']}"
        yield Case("multi_gpu.csv", case, f"{row['shape']} x{row['gpus']}", float(row["peak_gib"]), predicted)


def of_rank() -> Iterator[Case]:
    row = {"versions": "unsloth=2026.10.6", "dtype": "4bit"}
    for found in read("rank/speed.csv"):
        rank = int(re.search(r"r=(\d+)", found["variant"])[1])
        measured = float(found["peak_gb"]) * 1e9 / GIB
        yield Case("rank/speed.csv", f"r={rank}", "4x2048", measured, peak(row, 8192, rank=rank))


def of_end_to_end() -> Iterator[Case]:
    steps = {}
    for line in (FOLDER / "end_to_end-losses.jsonl").read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        steps[found["run"], found["model"], found["arm"]] = found["tokens"]
    for row in read("end_to_end.csv"):
        tokens = steps[row["run"], row["model"], row["arm"]]
        small = row["model"] == "llama1b"
        given = {"model": LLAMA_1B if small else LLAMA_3_8B, "tied": small, "checkpointing": "off"}  # `auto` chose so
        if row["arm"].startswith("unsloth"):
            size, predicted = CHAT["padded"], peak(row, CHAT["padded"], **given)
        elif small:
            size = CHAT["flat"]
            graphs = [bucket(size, False), bucket(size // 2, False)] if "exact" in row["arm"] else ()
            predicted = peak(row, size, captured=graphs, **given)
        else:  # four micro-batches as one, rows, graphs, no recompute
            size = max(tokens)
            sizes, share = sorted({bucket(one, False) for one in tokens}), 0.74 + 0.26 * 0.25
            predicted = peak(row, size, captured=sizes, through=round(share * size), **given)
        case = f"{row['model']}, {row['data']} {row['micro_batch']}, {row['arm']}"
        yield Case("end_to_end.csv", case, f"up to {size}", float(row["peak_gib"]), predicted)


def cases() -> list[Case]:
    """All measurements, with their forecasts."""
    parts = (of_speed, of_mixed, of_long, of_several, of_rank, of_end_to_end)
    return [case for part in parts for case in part()]


def table(found: Sequence[Case]) -> list[str]:
    """The lines of a table: each kind of case with its worst one."""
    groups = defaultdict(list)
    for case in found:
        groups[case.table, case.case].append(case)
    lines = [
        "| table | case | rows | worst at | measured | forecast | off |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for (name, what), group in groups.items():
        known = [case for case in group if case.predicted is not None]
        if not known:
            lines.append(f"| {name} | {what} | {len(group)} | | | | {group[0].why} |")
            continue
        worst = max(known, key=lambda case: abs(error(case)))
        lines.append(
            f"| {name} | {what} | {len(known)} | {worst.shape} | {worst.measured:.2f} | {worst.predicted:.2f} "
            f"| {error(worst):+.0%} |"
        )
    return lines


def error(case: Case) -> float:
    return case.predicted / case.measured - 1


def summary(found: Sequence[Case]) -> str:
    known = [abs(error(case)) for case in found if case.predicted is not None]
    return (
        f"{len(known)} measurements: off by {statistics.median(known):.1%} in the median, {max(known):.0%} at worst; "
        f"{sum(one <= WITHIN for one in known)} of them within {WITHIN:.0%}. {len(found) - len(known)} are left out."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into results/memory/README.md")
    args = parser.parse_args(argv)
    found = cases()
    lines = [summary(found), "", *table(found)]
    print(*lines, sep="\n")
    if args.write:
        path = FOLDER / "memory" / "README.md"
        begin = (
            "# Peak memory: forecast and measurement\n\nWritten by `python benchmarks/memory_forecast.py --write`.\n"
        )
        text = path.read_text(encoding="utf-8") if path.is_file() else begin
        head = text.partition("\n<!-- table -->\n")[0].rstrip("\n")
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([head, "", "<!-- table -->", "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
