"""Imports the installed Unsloth once, and runs each case in a fork of that process, on the CPU.

    python tests/backends/unsloth/installed FOLDER CASE...

Importing Unsloth takes long and changes torch and transformers for good: hence one process for all cases, and none of
them in the tests' own. A case is a module of this folder. Its `prepare` runs before the import, its `examine` gets what
that returned, in the folder FOLDER/CASE; the result becomes ``found-RANK.json``, the output ``said-RANK.txt``. A case
that has ended has a file ``ended``, and FOLDER a file ``over`` once all have, or this failed.
"""

import functools
import gc
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from interpreter import make_interpreter_faster
from processes import fork, wait_for


def run(case: ModuleType, prepared: object, folder: Path, rank: int) -> None:
    os.chdir(folder)
    ranks = (rank,) if hasattr(case, "RANKS") else ()
    Path(f"found-{rank}.json").write_text(json.dumps(case.examine(prepared, *ranks)))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    make_interpreter_faster()
    cases = {name: importlib.import_module(name) for name in names}
    prepared = {name: case.prepare() for name, case in cases.items()}
    import unsloth  # noqa: F401

    gc.freeze()
    for name, case in cases.items():
        place = folder / name
        place.mkdir()
        ranks = range(getattr(case, "RANKS", 1))
        wait_for(
            [
                fork(functools.partial(run, case, prepared[name], place, rank), place / f"said-{rank}.txt")
                for rank in ranks
            ]
        )
        (place / "ended").touch()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    finally:
        (Path(sys.argv[1]) / "over").touch()
