"""What a calibration leaves behind: the recipe with its estimator, a table, a picture and the figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.autosparsity.search import RELATIVE_ERROR, Calibration, Round
from sparse_unsloth.channels.storage import save_estimator
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.utils.environment import environment, version_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE_FILE, ESTIMATOR_FILE = "sparsity.yaml", "estimator.safetensors"
REPORT_FILE, FIGURES_FILE, PICTURE_FILE = "report.md", "report.json", "sensitivity.png"
CAPTURED = {"mlp": "mlp", "self_attn": "v"}
"""What the energy captured is of, by part; it is measured on context rows."""


def save(result: Calibration, folder: Path, dataset: str = "") -> SparsityConfig:
    """Writes recipe, estimator, table, figures and picture into ``folder``.

    Returns:
        The recipe as saved: its estimator is the file beside it.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = result.config
    if result.estimator is not None:
        save_estimator(result.estimator, folder / ESTIMATOR_FILE, result.layers, result.model_name)
        estimator = config.estimator.model_copy(update={"path": ESTIMATOR_FILE})
        config = config.model_copy(update={"estimator": estimator})
    config.save(folder / RECIPE_FILE)
    data = figures(result, dataset)
    (folder / FIGURES_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / REPORT_FILE).write_text(markdown(result, dataset), encoding="utf-8")
    draw(result, folder / PICTURE_FILE)
    return config


def summary(result: Calibration) -> list[str]:
    """The outcome in a few sentences."""
    chosen, held_out = result.chosen, result.held_out.get("calibrated")
    lines = [
        f"Context tokens compute {chosen.share:.1%} of their dense frozen products; "
        f"{result.data.context_share:.1%} of the tokens are context, so a step takes {result.step_flops:.1%} of its "
        f"dense FLOPs: {result.speedup:.2f}x if time followed FLOPs.",
        f"Divergence from the dense model, what sparsity adds to the loss of its own answers: {chosen.predicted:.3f} "
        f"nats predicted, {chosen.divergence:.3f} measured on {result.positions} answer tokens"
        + (f", {held_out.divergence:.3f} on {held_out.positions} held-out ones." if held_out is not None else "."),
        f"Loss of the labels: {result.dense_loss:.3f} dense, {_signed(chosen.measured)} sparse"
        + (f"; held out {held_out.dense_loss:.3f} and {_signed(held_out.increase)}." if held_out is not None else "."),
    ]
    first = result.rounds[0]
    if first.divergence > first.predicted and not first.foretold:
        lines.append(
            f"Together the parts cost more than alone: {first.predicted:.3f} was predicted for the first allocation, "
            f"{first.divergence:.3f} measured. Groups were measured beside the others, and the allocation repeated."
        )
    if not chosen.foretold:
        lines.append(f"The prediction is off by more than {RELATIVE_ERROR:.0%}: trust the measured figure.")
    return lines


def markdown(result: Calibration, dataset: str = "") -> str:
    """The report: outcome, rounds, sensitivity of each layer, picture."""
    asked = ", ".join(f"{name} {value:g}" for name, value in result.asked.items())
    lines = [
        f"# Calibrated sparsity: {Path(result.model_name).name}" + (f" on {dataset}" if dataset else ""),
        "",
        f"Asked: {asked}.",
    ]
    lines += ["", *(f"- {line}" for line in summary(result)), "", "## Rounds", ""]
    lines += _table(
        ["round", "frozen FLOPs of context", "divergence predicted", "measured", "loss of labels", "chosen"],
        [_round(number, outcome, result.chosen) for number, outcome in enumerate(result.rounds, start=1)],
    )
    lines += ["", "Nats; a prediction is made before its measurement."]
    if result.held_out:
        lines += ["", "## Held out", ""]
        lines += _table(
            ["recipe", "frozen FLOPs of context", "loss of labels", "divergence"],
            [
                [name, f"{found.share:.1%}", _signed(found.increase), f"{found.divergence:.3f}"]
                for name, found in result.held_out.items()
            ],
        )
        lines += ["", "Presets run with the same estimator."]
    lines += ["", "## Layers", ""]
    lines += _table(*_layer_table(result))
    lines += [
        "",
        "Columns of a part: its sparsity in the recipe; the share of the oracle's energy that its channels capture "
        "(attention: value channels); what it costs alone at each sparsity, as divergence from the dense model at "
        "loss-bearing positions, nats. The divergence is what sparsity adds to the loss of answers that the dense "
        "model itself gives; the labels' own loss moves by more than that with a single layer, up and down "
        f"([{FIGURES_FILE}]({FIGURES_FILE}) has both).",
        "",
        f"![Sensitivity by layer]({PICTURE_FILE})",
        "",
        "## Machine",
        "",
        _machine(),
    ]
    return "\n".join(lines) + "\n"


def figures(result: Calibration, dataset: str = "") -> dict[str, Any]:
    """Everything measured, as plain data."""
    number = result.rounds.index(result.chosen)
    return {
        "model": result.model_name,
        "dataset": dataset,
        "asked": result.asked,
        "dense_loss": result.dense_loss,
        "positions": result.positions,
        "rounds": [asdict(outcome) | {"foretold": outcome.foretold} for outcome in result.rounds],
        "chosen_round": number + 1,
        "held_out": {name: asdict(found) for name, found in result.held_out.items()},
        "context_share": result.data.context_share,
        "frozen_share": result.chosen.share,
        "step_flops": result.step_flops,
        "speedup": result.speedup,
        "captured": None if result.captured is None else asdict(result.captured),
        "alone": [
            {"layer": index, "part": part, "sparsity": sparsity, "loss": found.loss, "divergence": found.divergence}
            for (index, part), curve in result.alone.items()
            for sparsity, found in curve.items()
        ],
        "recipe": result.config.model_dump(mode="json"),
        "environment": environment(),
    }


def draw(result: Calibration, path: Path) -> None:
    """Sensitivity of each layer alone above, the recipe and the energy that it captures below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(part for _, part in result.alone))
    figure = Figure(figsize=(5.2 * len(parts), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(parts), squeeze=False, sharex=True)
    for column, part in enumerate(parts):
        _draw_alone(axes[0][column], result, part)
        _draw_recipe(axes[1][column], result, part)
    figure.savefig(path, dpi=120)


def _draw_alone(axes: Axes, result: Calibration, part: str) -> None:
    curves = {index: curve for (index, kind), curve in result.alone.items() if kind == part}
    for level in sorted(next(iter(curves.values()))):
        values = [max(curve[level].divergence, 1e-5) for curve in curves.values()]
        axes.plot(list(curves), values, marker=".", label=f"{level:g} sparse")
    axes.set(yscale="log", title=f"{PARTS[part]}, each layer alone", ylabel="divergence from dense, nats")
    axes.legend(fontsize="small")


def _draw_recipe(axes: Axes, result: Calibration, part: str) -> None:
    chosen = [getattr(sparsity, part) for sparsity in result.chosen.recipe]
    axes.bar(range(len(chosen)), chosen, color="tab:blue", alpha=0.6, label="sparsity")
    captured = _captured(result, part)
    if captured:
        axes.plot(list(captured), list(captured.values()), "k.", label="energy captured, of the oracle's")
    axes.set(xlabel="layer", ylim=(0, 1.05), title=f"{PARTS[part]}, together")
    axes.legend(fontsize="small", loc="lower right")


def _captured(result: Calibration, part: str) -> dict[int, float]:
    if result.captured is None or part not in CAPTURED:
        return {}
    return getattr(result.captured, CAPTURED[part])


def _layer_table(result: Calibration) -> tuple[list[str], list[list[str]]]:
    parts = list(dict.fromkeys(part for _, part in result.alone))
    heading = ["layer"]
    levels = {part: sorted(next(curve for (_, kind), curve in result.alone.items() if kind == part)) for part in parts}
    for part in parts:
        heading += [PARTS[part], "captured", *(f"at {level:g}" for level in levels[part])]
    body = []
    for index, sparsity in enumerate(result.chosen.recipe):
        row = [str(index)]
        for part in parts:
            value, curve = getattr(sparsity, part), result.alone[index, part]
            shares = _captured(result, part)
            row += [f"{value:g}" if value else "dense", f"{shares[index]:.2f}" if index in shares else ""]
            row += [f"{curve[level].divergence:.4f}" for level in levels[part]]
        body.append(row)
    return heading, body


def _round(number: int, outcome: Round, chosen: Round) -> list[str]:
    figures = [f"{outcome.predicted:.3f}", f"{outcome.divergence:.3f}", _signed(outcome.measured)]
    return [str(number), f"{outcome.share:.1%}", *figures, "yes" if outcome is chosen else ""]


def _table(heading: list[str], body: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(heading)} |", f"|{' ---: |' * len(heading)}"]
    return lines + [f"| {' | '.join(row)} |" for row in body]


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _machine() -> str:
    found = environment()
    names = ("sparse-unsloth", "torch", "transformers", "trl", "peft", "scipy")
    packages = ", ".join(f"{name} {version_of(name) or 'unknown'}" for name in names)
    processor = ", ".join(found["gpus"]) or f"{found['processor']}, {found['torch_threads']} threads"
    return f"{processor}; Python {found['python']}; {packages}."
