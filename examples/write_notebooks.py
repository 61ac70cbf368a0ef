"""Writes a notebook beside each script: `python examples/write_notebooks.py`.

A script has cells in the percent format: `# %%` opens a cell of code and `# %% [markdown]` one of text, whose lines are
comments. Notebooks are never edited; a test compares them with their scripts.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def scripts() -> list[Path]:
    """Returns the examples: the scripts that begin with a cell."""
    return [path for path in sorted(FOLDER.glob("*.py")) if CELL.match(path.read_text(encoding="utf-8"))]


def notebook(script: str) -> str:
    """Returns the text of the notebook, in nbformat 4.5, of a script's text.

    Raises:
        ValueError: the script does not begin with a cell.
    """
    before, *parts = CELL.split(script)
    if before:
        raise ValueError("an example begins with `# %%` or `# %% [markdown]`")
    cells = []
    for index, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        text = text.strip("\n")
        if kind:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cell = {"cell_type": "markdown" if kind else "code", "id": f"cell-{index}", "metadata": {}}
        cell |= {} if kind else {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
