"""Runs ``study spectra``: measures how fast a model's singular values decay, and the loss of approximations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.reporting.figures import new_figure, save_figure
from sparse_unsloth.reporting.paired_tests import compare_methods
from sparse_unsloth.reporting.tables import StudyError, aggregate, groups, write_csv
from sparse_unsloth.study.approximation import LOW_RANK, MAGNITUDE, Decomposition, low_rank_loss, magnitude_loss
from sparse_unsloth.study.checkpoint import StoredLayer, find_checkpoint, linear_layers
from sparse_unsloth.study.whitening import input_moments, read_texts, whiten
from sparse_unsloth.utils.progress import bar


def spectra(
    model: str,
    outdir: Path,
    *,
    ranks: Sequence[int] = (1, 8, 32, 128),
    keep_ratio: float = 0.1,
    max_layers: int | None = None,
    max_elements: int | None = None,
    seed: int = 0,
    test: str = "t",
    calibration_text: Path | None = None,
    calibration_samples: int = 32,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Analyses the stored linear layers of ``model`` in turn, and writes CSV files and a picture.

    Args:
        ranks: the ranks whose energy is listed, as far as they are within a matrix's rank.
        keep_ratio: rank over full rank, or share of entries, rows or columns kept, in (0, 1].
        max_layers: the maximum number of linear layers, spread evenly over the model; None: all.
        max_elements: larger matrices are skipped, and named in ``spectra_skipped.txt``; None: none.
        calibration_text: texts to whiten by; None: no whitened spectra.
        device: where matrices are factorised.

    Returns:
        The rows of ``spectra_layers.csv``.

    Raises:
        StudyError: a value is out of range, the checkpoint cannot be read, or no layer is left.
    """
    if not 0 < keep_ratio <= 1 or min(ranks, default=0) < 1 or (max_layers or 1) < 1:
        raise StudyError(
            f"spectra: keep_ratio must lie in (0, 1], ranks and max_layers be at least 1; given {keep_ratio}, "
            f"{list(ranks)}, {max_layers}."
        )
    folder = find_checkpoint(model)
    found = linear_layers(folder)
    skipped = [layer for layer in found if max_elements is not None and layer.shape[0] * layer.shape[1] > max_elements]
    layers = [layer for layer in found if layer not in skipped]
    if not layers:
        raise StudyError(f"spectra: each of the {len(found)} linear layers has more than {max_elements} elements.")
    if max_layers is not None and len(layers) > max_layers:
        # Both ends included: an even stride could meet the same projection of every decoder layer.
        step = (len(layers) - 1) / max(max_layers - 1, 1)
        layers = [layers[round(position * step)] for position in range(max_layers)]
    moments = _moments(folder, layers, calibration_text, calibration_samples)

    summary: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    for layer in bar(layers, "spectra", "layer"):
        weight = layer.load().to(device)
        summary.append(_analyse(layer.name, "plain", weight, ranks, keep_ratio, generator, values, losses))
        if layer.name in moments:
            whitened = whiten(weight, moments[layer.name].to(device))
            summary.append(_analyse(layer.name, "whitened", whitened, ranks, keep_ratio, generator, values, losses))

    write_csv(outdir / "spectra_layers.csv", summary)
    write_csv(outdir / "spectra_values.csv", values)
    write_csv(outdir / "spectra_errors.csv", losses)
    means = aggregate(losses, ["space", "method"], ["frobenius", "spectral", "parameters", "seconds"])
    write_csv(outdir / "spectra_summary.csv", means)
    if len(layers) > 1:
        write_csv(outdir / "spectra_tests.csv", compare_methods(losses, ["space"], "layer", "frobenius", test))
    outdir.joinpath("spectra_skipped.txt").write_text("".join(f"{x.name} {x.shape}\n" for x in skipped))
    _draw(values, losses, keep_ratio, outdir / "spectra.png")
    return summary


def _moments(folder: Path, layers: list[StoredLayer], text: Path | None, samples: int) -> dict[str, Tensor]:
    if text is None:
        return {}
    return input_moments(folder, [layer.name for layer in layers], read_texts(text, samples))


def _analyse(
    name: str,
    space: str,
    weight: Tensor,
    ranks: Sequence[int],
    keep_ratio: float,
    generator: torch.Generator,
    values: list[dict[str, Any]],
    losses: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the row of one matrix; adds its singular values and losses to the long tables."""
    began = time.perf_counter()
    known = Decomposition.of(weight)
    svd_seconds = time.perf_counter() - began
    size, rank = len(known.values), max(1, round(keep_ratio * len(known.values)))
    cumulated = known.energy.cumsum(0)
    for index, (value, energy) in enumerate(zip(known.values.tolist(), cumulated.tolist(), strict=True)):
        values.append({"layer": name, "space": space, "index": index + 1, "value": value, "energy": energy})
    for method in LOW_RANK + (MAGNITUDE if space == "plain" else ()):
        low_rank = method in LOW_RANK
        loss = low_rank_loss(method, known, rank, generator) if low_rank else magnitude_loss(method, known, keep_ratio)
        losses.append({"layer": name, "space": space, "method": method, "rank": rank if low_rank else ""} | vars(loss))
    return {
        "layer": name,
        "space": space,
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "largest": known.values[0].item(),
        # The rank of a flat spectrum with the same energy and largest value.
        "stable_rank": (1 / known.energy[0]).item(),
        "rank_of_90_percent": int((cumulated < 0.9).sum()) + 1,
        "svd_seconds": svd_seconds,
    } | {f"energy_top_{top}": cumulated[top - 1].item() if top <= size else "" for top in ranks}


def _draw(values: list[dict], losses: list[dict], keep_ratio: float, path: Path) -> None:
    spaces = list(dict.fromkeys(row["space"] for row in values))
    figure, axes = new_figure(3, len(spaces), share_y=False)
    for row, space in enumerate(spaces):
        decay, energy, errors = axes[3 * row : 3 * row + 3]
        by_layer = groups([value for value in values if value["space"] == space], ["layer"])
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for (name,) in by_layer))
        seen = set()
        for (name,), members in by_layer.items():
            kind = name.rpartition(".")[2]
            style = {"color": f"C{kinds.index(kind) % 10}", "alpha": 0.6, "linewidth": 0.9}
            places = [member["index"] / len(members) for member in members]
            first = members[0]["value"] or 1.0
            label = kind if kind not in seen else None
            decay.plot(places, [member["value"] / first for member in members], label=label, **style)
            energy.plot(places, [member["energy"] for member in members], **style)
            seen.add(kind)
        decay.set(title=f"{space}: singular values", yscale="log", ylim=(1e-4, 1.3), xlabel="index / full rank")
        decay.set_ylabel("value / largest")
        decay.legend(fontsize="small")
        energy.set(title=f"{space}: energy of the top k", xlabel="k / full rank", ylabel="share", ylim=(0, 1.02))
        by_method = groups([loss for loss in losses if loss["space"] == space], ["method"])
        names = [name for (name,) in by_method]
        data = [[member["frobenius"] for member in members] for members in by_method.values()]
        errors.boxplot(data, orientation="horizontal", tick_labels=names)
        errors.invert_yaxis()
        errors.set(title=f"{space}: error at keep ratio {keep_ratio}", xlabel="relative Frobenius error, by layer")
    save_figure(figure, path)
