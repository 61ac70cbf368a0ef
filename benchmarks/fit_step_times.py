"""Fits step times to ``speed.csv`` and stores them in the package, for `sparse-unsloth estimate`.

    python benchmarks/fit_step_times.py [benchmarks/results/speed.csv]

Run it after rows were appended: a test fails while the stored figures are not those of the table. The fit is of dense
steps and steps with channel sparsity, without steps of ``rows-25`` and the like (`backward_rows`). Steps with
`cuda_graphs`, in the folder ``graphs`` beside the table, measure the error of predictions of such steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_unsloth.bench.methods import without_backend
from sparse_unsloth.bench.table import read_rows
from sparse_unsloth.forecast.speed_table import fit_table, save
from sparse_unsloth.planning.fits import STORED

RESULTS = Path(__file__).parent / "results" / "speed.csv"


def rows_to_fit(table: Path) -> list[dict]:
    """Reads all rows without those of ``backward_rows`` methods, and the steps with CUDA graphs beside the table."""
    with_graphs = [row for name in ("speed.csv", "dense.csv") for row in read_rows(table.parent / "graphs" / name)]
    return [row for row in read_rows(table) if not without_backend(row["method"]).startswith("rows-")] + [
        row for row in with_graphs if row["method"].endswith("-graphs")
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=RESULTS)
    fitted = fit_table(rows_to_fit(parser.parse_args(argv).table))
    save(fitted)
    for one in fitted:
        print(f"{one.device}, {one.backend}, {one.dtype}: {one.rows} rows, {one.step_time}\n  {one.errors}")
    print(f"written to {STORED}")


if __name__ == "__main__":
    main()
