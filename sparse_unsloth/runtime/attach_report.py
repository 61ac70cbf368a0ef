"""Reports what attaching did to a model, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.model.decoder_layer import left_out_layers
from sparse_unsloth.runtime.state import LayerRuntime, SparsityState


@dataclass(frozen=True)
class LayerReport:
    """What was hooked in one decoder layer.

    Attributes:
        mlp, self_attn: the sparsity of each part; 0 is dense.
        mlp_channels, key_channels: ``(kept, all)`` channels that context tokens compute.
    """

    name: str
    mlp: float
    self_attn: float
    mlp_channels: tuple[int, int]
    key_channels: tuple[int, int]


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer.

    Attributes:
        exact_removal: where unused rows are skipped; "" for nowhere.
        backward_rows: see `SparsityConfig.backward_rows`; ``row_layers``: in how many layers.
        whole_layers: how many layers run as whole layers, proved in a probe forward.
        captured_layers: how many of them CUDA graphs will hold (`SparsityConfig.cuda_graphs`).
        not_whole, not_captured: ``(reason, number of layers)`` of the other candidates. They compute the same, slower.
        auto: the rest is decided when training begins.
        left_out: decoder layers without a sparse path, by name: what each lacks.
    """

    backend: str
    layers: tuple[LayerReport, ...]
    exact_removal: str = ""
    backward_rows: float = 1.0
    row_layers: int = 0
    whole_layers: int = 0
    captured_layers: int = 0
    not_whole: tuple[tuple[str, int], ...] = ()
    not_captured: tuple[tuple[str, int], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    auto: bool = False

    @property
    def num_sparse(self) -> int:
        return self.row_layers or sum(bool(layer.mlp or layer.self_attn) for layer in self.layers)

    @property
    def num_layers(self) -> int:
        """The number of all decoder layers."""
        return len(self.layers) + len(self.left_out)

    def __str__(self) -> str:
        lines = [
            f"sparse_unsloth: {self.num_sparse} of {self.num_layers} layers sparse on context tokens ({self.backend})"
        ]
        if self.auto:
            lines = [
                f"sparse_unsloth: {self.num_layers} layers attached ({self.backend}); auto decides when training begins"
            ]
        if self.row_layers:
            lines.append(f"  exact forward; backward through {self.backward_rows:.3g} of the context tokens in each")
        alike = _runs((layer.name, replace(layer, name="")) for layer in self.layers)
        for first, last, layer in () if self.row_layers or self.auto else alike:
            span = f"layer {first}" if first == last else f"layers {first}-{last}"
            mlp = _kept(layer.mlp, layer.mlp_channels)
            attention = _kept(layer.self_attn, layer.key_channels)
            lines.append(f"  {span}: MLP {mlp}; attention {attention}")
        lines += [f"  {places}: left out, dense ({reason})" for reason, places in self._reasons().items()]
        if self.exact_removal:
            lines.append(f"  unused rows skipped in: {self.exact_removal}")
        return "\n".join([*lines, *self.speed_lines()])

    def speed_lines(self) -> list[str]:
        """How the layers run: as whole layers, captured in CUDA graphs, or part by part, with the reasons."""
        lines = []
        if self.backend == "peft" and self.num_sparse and not (self.whole_layers or self.not_whole):
            lines.append("  layers run part by part: Triton's kernels do not run here")
        if self.whole_layers or self.not_whole:
            lines.append(f"  {self.whole_layers} of {len(self.layers)} layers run as a whole")
        lines += [f"  {count} of {len(self.layers)} part by part: {reason}" for reason, count in self.not_whole]
        if self.captured_layers or self.not_captured:
            lines.append(f"  {self.captured_layers} of {len(self.layers)} layers are captured in CUDA graphs")
        return lines + [f"  {count} not captured: {reason}" for reason, count in self.not_captured]

    def _reasons(self) -> dict[str, str]:
        """The layers without a sparse path, as "layers 0-2, 4-6", by reason."""
        spans: dict[str, list[str]] = {}
        for first, last, reason in _runs(self.left_out.items()):
            spans.setdefault(reason, []).append(str(first) if first == last else f"{first}-{last}")
        return {
            reason: f"layer{'s' if len(found) > 1 or '-' in found[0] else ''} {', '.join(found)}"
            for reason, found in spans.items()
        }


def _runs(layers: Iterable[tuple[str, Any]]) -> list[tuple[int, int, Any]]:
    """Runs of neighbouring layers with equal values, as ``(first, last, value)``; ``layers``: ``(name, value)``."""
    runs: list[tuple[int, int, Any]] = []
    for index, (name, value) in enumerate(layers):
        number = _number(name, index)
        if runs and runs[-1][1:] == (number - 1, value):
            runs[-1] = (runs[-1][0], number, value)
        else:
            runs.append((number, number, value))
    return runs


def _number(name: str, default: int) -> int:
    """The layer's number: the last number in its name."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), default)


def _kept(sparsity: float, channels: tuple[int, int]) -> str:
    return f"{channels[0]} of {channels[1]} channels" if sparsity else "dense"


def report(state: SparsityState, exact_removal: str) -> AttachReport:
    """The report on an attached model; ``exact_removal``: where unused rows are skipped, "" for nowhere."""
    rows = []
    for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True):
        keys = layer.num_kv_heads * layer.head_dim
        rows.append(
            LayerReport(
                name=layer.name,
                mlp=sparsity.mlp,
                self_attn=sparsity.self_attn,
                mlp_channels=(keep_count(layer.intermediate_size, sparsity.mlp), layer.intermediate_size),
                key_channels=(keep_count(keys, sparsity.self_attn), keys),
            )
        )
    forwards = state.whole_forwards
    captured = [runtime for runtime in forwards if not runtime.not_captured] if state.graphs is not None else []
    return AttachReport(
        state.backend.name,
        tuple(rows),
        exact_removal,
        state.config.backward_rows,
        row_layers=len(state.runtimes) if state.row_sparse else 0,
        left_out=left_out_layers(state.stack, state.layers),
        auto=state.auto is not None,
        whole_layers=sum(not runtime.not_whole for runtime in forwards),
        captured_layers=len(captured),
        not_whole=reasons(forwards, "not_whole"),
        not_captured=reasons(forwards, "not_captured"),
    )


def reasons(runtimes: Iterable[LayerRuntime], name: str) -> tuple[tuple[str, int], ...]:
    """``(reason, number of layers)`` by attribute ``name`` of the runtimes, the most frequent reason first."""
    return tuple(Counter(reason for runtime in runtimes if (reason := getattr(runtime, name))).most_common())
