"""The settings that are compared, and what each of their steps leaves out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sparse_unsloth.layer_rules import expand
from sparse_unsloth.quality.network import DENSE, Mode
from sparse_unsloth.schedule import Schedule
from sparse_unsloth.selection import keep_count

CONTEXTUAL = ("prior", "whitened", "product", "prior-norms")
STATIC = ("static", "static-norms")
SELECTORS = (*CONTEXTUAL, *STATIC, "random")


class StepPlan(NamedTuple):
    """One step: which masks it looks at, and how many MLP channels context rows keep in each layer."""

    mode: Mode
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        steps: share of the dense run's optimiser steps, with a learning rate schedule of its own.
        mlp: layer rules, the share of MLP channels left out on context rows; of the kind "rows", the share of context
            rows left out of the backward pass.
        self_attn: layer rules of the key and value channels left out.
        selector: one of `SELECTORS`: kinds of estimator, "product" of the whitened estimate and the static energy,
            "-norms" weighted by the norms of the down projection's columns, "random" anew at every step.
        compensation: rank of the stand-ins, 0 for none.
        kind, cut: see `Mode`; ``cut`` gives the first layer from which on (counted from 0) context rows stay connected:
            below it their gradients stop at each layer. None: nowhere.
        start, end: see `Schedule`.
        mix: "alternate": every other step between start and end is dense; "layers": at each step a random half of
            the layers is.
        refits: when the stand-ins are fitted again, as shares of the training.
        stream: see `fit_stand_ins`.
        pairing: "naive" pairs query heads with key heads as the older implementations did.
        last, per_sample: see `Mode`.
        outputs: share of MLP channels that answer tokens keep, 1 for all.
    """

    steps: float = 1.0
    mlp: Mapping[str, float] = field(default_factory=dict)
    self_attn: Mapping[str, float] = field(default_factory=dict)
    selector: str = "prior"
    compensation: int = 0
    kind: str = "forward"
    cut: int | None = None
    start: float = 0.05
    end: float = 0.75
    mix: str = ""
    refits: tuple[float, ...] = ()
    stream: str = "dense"
    pairing: str = "groups"
    last: bool = False
    per_sample: bool = False
    outputs: float = 1.0

    def __post_init__(self):
        if self.selector not in SELECTORS or (self.compensation and self.selector not in STATIC):
            raise ValueError(f"selector {self.selector!r} with compensation {self.compensation}: not a setting")
        if self.per_sample and not self.contextual:
            raise ValueError(f"selector {self.selector!r} looks at no sample, so none has channels of its own")

    @property
    def contextual(self) -> bool:
        return self.selector in CONTEXTUAL and self.kind != "rows"

    @property
    def calibrated(self) -> bool:
        """Whether its channels are chosen by what a calibration found."""
        return self.mode != DENSE and self.kind != "rows" and self.selector != "random"

    @property
    def mode(self) -> Mode:
        """Of a sparse step."""
        if not self.mlp and not self.self_attn:
            return DENSE._replace(cut=self.cut is not None)
        return Mode(
            kind=self.kind,
            cut=self.cut is not None,
            contextual=self.contextual,
            compensation=self.compensation > 0,
            attention=bool(self.self_attn),
            outputs=self.outputs < 1,
            last=self.last,
            per_sample=self.per_sample,
            random_rows=self.kind == "rows" and self.selector == "random",
        )

    def keep(self, layers: int, inner: int) -> tuple[int, ...]:
        """MLP channels that each layer keeps on context rows; sparsity 1 keeps none."""
        shares = expand(self.mlp, [0.0] * layers)
        return tuple(0 if share >= 1 else keep_count(inner, share) for share in shares)

    def plan(self, steps: int, layers: int, inner: int) -> list[StepPlan]:
        """Every step of a training of ``steps`` steps; the same for all seeds."""
        schedule, rng = Schedule(self.start, self.end), random.Random(0)
        full, dense = self.mode, StepPlan(DENSE, (inner,) * layers)
        plans = []
        for step in range(steps):
            sparse = full != DENSE and schedule.scale(step, steps) > 0
            if not sparse or (self.mix == "alternate" and step % 2):
                plans.append(dense)
                continue
            keep = self.keep(layers, inner)
            if self.mix == "layers":
                keep = tuple(inner if rng.random() < 0.5 else count for count in keep)
            plans.append(StepPlan(full, keep))
        return plans


def half(share: float, **changes) -> Arm:
    """An arm that leaves out ``share`` of the MLP channels of every layer but the first."""
    return Arm(mlp={"1-29": share}, **changes)


def rows(share: float, **changes) -> Arm:
    """An exact forward, whose backward pass goes on through ``share`` of the context rows in every layer."""
    return Arm(mlp={"0-29": 1 - share}, kind="rows", start=0.0, end=1.0, **changes)


RANK = 64
DENSE_SHARES = {"dense": 1.0, "dense-75": 0.75, "dense-65": 0.65, "dense-50": 0.5, "dense-30": 0.3}
STAND_IN = {"selector": "static", "compensation": RANK}
RECIPE = {
    "mlp": {
        "3-5": 0.75, "6": 0.5, "7-9": 0.75, "10-16": 0.5, "17-20": 0.75, "21": 0.97, "22": 0.75, "23": 0.9,
        "24-26": 0.97, "27": 0.9, "28-29": 0.97,
    },
    "self_attn": {"25": 0.5, "27": 0.25, "29": 0.25},
}  # fmt: skip
"""benchmarks/results/calibrate/budget-0.5/sparsity.yaml: half of the frozen FLOPs of context tokens."""

ARMS: dict[str, Arm] = {
    **{name: Arm(steps=share) for name, share in DENSE_SHARES.items()},
    "channels-50": half(0.5),
    # Exact forwards: what is trained is what is used, and only the backward pass is cheaper.
    "cut": Arm(cut=99, end=1.0),
    "backward-0": half(1.0, kind="backward", end=1.0),
    "comp-50": half(0.5, **STAND_IN),
    "comp-25-no-tail": half(0.75, **STAND_IN, end=1.0),
    "comp-25-tail-10": half(0.75, **STAND_IN, end=0.9),
    "comp-25": half(0.75, **STAND_IN),
    "comp-25-refit": half(0.75, **STAND_IN, end=0.9, refits=(0.15, 0.3, 0.45, 0.6), stream="sparse"),
    "comp-25-layers": half(0.75, **STAND_IN, end=0.9, mix="layers"),
    "cut-comp-50": half(0.5, **STAND_IN, cut=99, end=0.9),
    "random": half(0.5, selector="random"),
    "keep-0": half(1.0, selector="static"),
    "static-50": half(0.5, selector="static"),
    "cut-tail-10": Arm(cut=99, end=0.9),
    "backward-25": half(0.75, kind="backward", end=1.0),
    # Gradients of context rows are uneven: most of them is in few rows.
    "default": rows(0.25),
    "default-75": rows(0.25, steps=0.75),
    "default-50": rows(0.25, steps=0.5),
    "rows-10": rows(0.1),
    "rows-10-75": rows(0.1, steps=0.75),
    "rows-10-50": rows(0.1, steps=0.5),
    "random-rows-25-50": rows(0.25, steps=0.5, selector="random"),
    # Where the dense curve is flat nothing can be won: the same with fewer steps meets it where it is steep.
    "backward-0-70": half(1.0, kind="backward", end=1.0, steps=0.7),
    "backward-25-65": half(0.75, kind="backward", end=1.0, steps=0.65),
    "cut-lower": Arm(cut=15, end=1.0),
    "comp-10-refit": half(0.9, **STAND_IN, end=0.9, refits=(0.15, 0.3, 0.45, 0.6), stream="sparse"),
    "recipe": Arm(**RECIPE),
    "recipe-comp": Arm(mlp=RECIPE["mlp"], **STAND_IN),
    "uniform-recipe": half(0.69),
    "comp-25-alternate": half(0.75, **STAND_IN, end=0.9, mix="alternate"),
    "tail-10": half(0.5, end=0.9),
    "tail-30": half(0.5, end=0.7),
    "no-tail": half(0.5, end=1.0),
    "last-token": half(0.5, last=True),
    "layer-0": Arm(mlp={"0-29": 0.5}),
    "naive-pairing": Arm(self_attn={"10-29": 0.5}, selector="static", pairing="naive"),
    "attention-50": Arm(self_attn={"10-29": 0.5}, selector="static"),
    "whitened": half(0.5, selector="whitened"),
    "product": half(0.5, selector="product"),
    "prior-norms": half(0.5, selector="prior-norms"),
    "per-sample": half(0.5, per_sample=True),
    "per-sample-no-tail": half(0.5, per_sample=True, end=1.0),
    "static-norms": half(0.5, selector="static-norms"),
    "outputs-75": half(0.5, outputs=0.75),
    "no-compensation-25": half(0.75, selector="static", end=0.9),
}
"""In the order of their importance on task A."""

SHORT = (
    *DENSE_SHARES, "default", "default-50", "rows-10", "random-rows-25-50", "default-75", "rows-10-50", "channels-50",
    "backward-25", "comp-25-no-tail", "random",
)  # fmt: skip
"""What tasks B and C compare."""
CONTROLS = ("random", "random-rows-25-50", "keep-0", "naive-pairing", "last-token", "layer-0")
