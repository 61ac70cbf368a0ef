"""Writes the tables of docs/configuration.md from the fields of the configurations, between its two markers."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints
from unittest import mock

from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.rank.config import RankConfig
from sparse_unsloth.training import keys

PAGE = Path(__file__).with_name("configuration.md")
BLOCK = re.compile(r"(<!-- fields -->\n).*?(<!-- end of fields -->)", re.DOTALL)


def table(rows: list[tuple[str, str, object, str]]) -> list[str]:
    """A Markdown table of ``(key, type, default, help)``."""
    lines = ["| key | type | default | what it does |", "| --- | --- | --- | --- |"]
    for key, kind, default, text in rows:
        given = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        cells = (f"`{key}`", kind, f"`{given}`", text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def pydantic_rows(kind: type, prefix: str = "") -> list[tuple[str, str, object, str]]:
    """The rows of a pydantic model; the estimator is described as a block."""
    texts, rows = keys.field_texts(kind), []
    for name, field in kind.model_fields.items():
        if field.annotation is EstimatorConfig:
            rows.append((name, "a block", "{}", "How channels are ranked: the next table."))
        else:
            rows.append((prefix + name, keys.describe(field.annotation), field.default, texts[name]))
    return rows


def tables() -> str:
    """All tables of the page."""
    with mock.patch.object(keys, "key_blocks", return_value={"data": DataArguments}):  # TRL's keys are not on the page
        recipe = list(keys.recipe_keys().values())
    own = [key for key in recipe if key.owner != DataArguments.__name__]
    data = [key for key in recipe if key.owner == DataArguments.__name__]
    hints, texts = get_type_hints(RankConfig), keys.field_texts(RankConfig)
    ranks = [
        (field.name, keys.describe(hints[field.name]), field.default, texts[field.name])
        for field in dataclasses.fields(RankConfig)
    ]
    blocks = {"sparsity": "a preset, a file or a block", "rank": "a block"}

    def recipe_rows(chosen: list) -> list[tuple[str, str, object, str]]:
        return [
            (key.name, blocks.get(key.name) or keys.describe(key.kind), key.default, key.help.replace("%%", "%"))
            for key in chosen
        ]

    parts = {
        "The block `sparsity`": table(pydantic_rows(SparsityConfig)),
        "The block `sparsity.estimator`": table(pydantic_rows(EstimatorConfig, "estimator.")),
        "Keys of a recipe": [
            "Every key of TRL's `SFTConfig` and `ModelConfig` is one too; `sparse-unsloth keys` lists all.",
            "",
            *table(recipe_rows(own)),
        ],
        "Data of a recipe": table(recipe_rows(data)),
        "The block `rank`": ["[Rank-sparse LoRA](rank-sparse-lora.md).", "", *table(ranks)],
    }
    return "\n".join(line for title, lines in parts.items() for line in (f"\n## {title}\n", *lines)) + "\n\n"


def written(text: str) -> str:
    """The page ``text`` with its tables as the code has them."""
    return BLOCK.sub(lambda found: found[1] + tables() + found[2], text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
