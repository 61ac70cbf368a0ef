"""Defines the arms: the ways to run Unsloth, or PEFT without it, that our methods are compared with.

Unsloth reads environment variables when it is imported and replaces the forwards of classes, as Liger does, so arms
that differ in variables, kernels or arguments of ``get_peft_model`` need separate processes
(`sparse_unsloth.bench.processes`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from sparse_unsloth.errors import ConfigError
from sparse_unsloth.utils.environment import version_of

STOCK, LIGER, PEFT = "stock", "liger", "peft"
BASELINES = STOCK, LIGER
"""Arms that speed-ups of a run refer to: the first that the run has."""
FLAT, PADDED = "flat", "padded"
"""Layouts of a micro-batch's documents: in one sequence without padding, as Unsloth does, or a padded sequence each."""
GRAPHS, SKIP = "UNSLOTH_BLOCK_CUDAGRAPHS", "checkpoint_skip_layers"


@dataclass(frozen=True)
class Arm:
    """One way to run Unsloth, or PEFT.

    Attributes:
        what: one line of help.
        backend: "unsloth" or "peft".
        liger: with Liger's kernels, as transformers' ``use_liger_kernel`` applies them.
        layout: of its micro-batches.
        env: variables of the process that imports Unsloth.
        lora: arguments of ``get_peft_model`` besides Unsloth's defaults.
        needs: ``(file, word)``: a file of Unsloth's package must contain that word for the arm to exist.
    """

    what: str
    layout: str = FLAT
    backend: str = "unsloth"
    liger: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    lora: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Arm) -> Arm:
        """Combines two arms; the result is padded, of PEFT, or with Liger's kernels, if one of them is."""
        for name in ("env", "lora"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if clash := [key for key in ours if theirs.get(key, ours[key]) != ours[key]]:
                raise ConfigError(f"arms that set {', '.join(clash)} to different values do not go together")
        layout = PADDED if PADDED in (self.layout, other.layout) else FLAT
        needs = tuple(dict.fromkeys(self.needs + other.needs))
        backend = "peft" if "peft" in (self.backend, other.backend) else "unsloth"
        if backend == "peft" and needs:
            raise ConfigError("arms of PEFT without Unsloth do not go together with what Unsloth alone can do")
        what, liger = f"{self.what}; {other.what}", self.liger or other.liger
        return Arm(what, layout, backend, liger, {**self.env, **other.env}, {**self.lora, **other.lora}, needs)


_SKIPS = (("models/llama.py", SKIP),)
ARMS = {
    STOCK: Arm("Unsloth's defaults, padding-free batches"),
    "padded": Arm("padded batches (padding_free=False), for which Unsloth compiles layers from torch 2.11 on", PADDED),
    "block-graphs": Arm(
        f"padded batches, compiled layers as CUDA graphs ({GRAPHS}=1): up to 8 shapes",
        PADDED,
        env={GRAPHS: "1"},
        needs=(("models/_block_compile.py", GRAPHS),),
    ),
    "skip-max": Arm(f'get_peft_model({SKIP}="max"): all layers keep activations', lora={SKIP: "max"}, needs=_SKIPS),
    "skip-auto": Arm(
        f'get_peft_model({SKIP}="auto"): as many as fit, found in the first step', lora={SKIP: "auto"}, needs=_SKIPS
    ),
    "no-checkpointing": Arm(
        "get_peft_model(use_gradient_checkpointing=False)", lora={"use_gradient_checkpointing": False}
    ),
    LIGER: Arm(
        "transformers and PEFT with Liger's kernels, without Unsloth, padded batches", PADDED, "peft", liger=True
    ),
    PEFT: Arm("likewise without Liger's kernels", PADDED, "peft"),
}
OF_PEFT = tuple(name for name, arm in ARMS.items() if arm.backend == "peft")
DEFAULT_ARMS = {
    "unsloth": ",".join((*(name for name in ARMS if name not in OF_PEFT), "padded+no-checkpointing")),
    "peft": ",".join(OF_PEFT),
}
"""By backend."""
KEPT = (
    "UNSLOTH_COMPILE_LOCATION",
    "UNSLOTH_COMPILE_USE_TEMP",
    "UNSLOTH_DISABLE_STATISTICS",
    "UNSLOTH_HOME",
    "UNSLOTH_OFFLINE",
    "UNSLOTH_USE_MODELSCOPE",
)
"""Unsloth's variables that do not change its training: an arm is Unsloth's defaults with the arm's variables."""


def conflicts_with_arms(name: str) -> bool:
    """Whether a variable of the user would change the arms."""
    return name.startswith("UNSLOTH_") and name not in KEPT


def arm_of(name: str) -> Arm:
    """Returns the arm of a name; names joined by ``+`` are one arm.

    Raises:
        ConfigError: there is no such arm, or joined arms contradict each other.
    """
    parts = name.split("+")
    if unknown := [part for part in parts if part not in ARMS]:
        raise ConfigError(
            f"there is no arm {', '.join(unknown)}; arms are {', '.join(ARMS)}, and several of them joined by +"
        )
    return reduce(Arm.__add__, [ARMS[part] for part in parts])


def arms_of(names: str) -> dict[str, Arm]:
    """Returns arms by name, from names separated by commas; an empty text names none.

    Raises:
        ConfigError: see `arm_of`.
    """
    return {name: arm_of(name) for name in names.split(",") if name}


def why_not_installed(arm: Arm, folder: Path | None = None) -> str | None:
    """Returns why what is installed does not have the arm; None where it does. Does not import Unsloth.

    Args:
        folder: of Unsloth's package, instead of the installed one.
    """
    if arm.backend == "peft":
        missing = arm.liger and importlib.util.find_spec("liger_kernel") is None
        return "not there: liger-kernel is not installed (pip install liger-kernel)" if missing else None
    if folder is None:
        found = importlib.util.find_spec("unsloth")
        if found is None:
            return "not there: Unsloth is not installed"
        folder = Path(found.origin).parent
    for name, word in arm.needs:
        file = folder / name
        if not file.is_file() or word not in file.read_text(encoding="utf-8"):
            return f"not there: Unsloth {version_of('unsloth')} has no {word}"
    return None


def why_unavailable(arm: Arm, model: nn.Module) -> str | None:
    """Returns why the arm does nothing on this loaded model: CUDA graphs need compiled layers, Liger a known family."""
    if arm.liger:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as families

        kind = model.config.model_type
        return None if kind in families else f"not there: Liger {version_of('liger-kernel')} has no kernels for {kind}"
    if GRAPHS in arm.env and not compiled_layers(model):
        return f"not there: Unsloth compiles no layer here (torch {version_of('torch')}), so {GRAPHS} does nothing"
    return None


def compiled_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers that Unsloth compiles for padded batches."""
    return [module for module in model.modules() if getattr(type(module).forward, "_unsloth_block_compiled", False)]


def replan_arm(arm: Arm, model: nn.Module, documents: int, longest: int) -> None:
    """Makes ``checkpoint_skip_layers="auto"`` plan again in the next two steps, for another size of micro-batch.

    Unsloth plans once per model, for the size that its trainer gives it, ``documents`` sequences of ``longest`` tokens;
    this makes the trainer's call. Other arms do not plan.
    """
    if arm.lora.get(SKIP) != "auto":
        return
    import unsloth_zoo.gradient_checkpointing as offload
    from unsloth.models import _utils

    for module in model.modules():
        module.__dict__.pop("_unsloth_skip_checkpoint", None)
    if getattr(offload, "CURRENT_GC_INDEX", None) == 0:  # it has counted the layers that were checkpointed
        offload.FIRST_PASS, offload.LAST_GC_INDEX = True, 0
    _utils.skip_checkpointing(model, "auto")
    sizes = SimpleNamespace(per_device_train_batch_size=documents, max_length=longest)
    _utils._size_auto_checkpoint_skip_for_trainer(SimpleNamespace(model=model, args=sizes))


def arm_notes(arm: Arm, model: nn.Module) -> str:
    """Describes after the timing what Unsloth did, for the table's notes."""
    if arm.backend == "peft":
        return f"attention {model.config._attn_implementation}"
    found = []
    if arm.layout == PADDED:
        layers = compiled_layers(model)
        off = getattr(sys.modules.get("unsloth.models._block_compile"), "_OFF", None)
        ran = [
            layer
            for layer in layers
            if layer.__dict__.get("_unsloth_block_checked") and layer.__dict__.get("_unsloth_block_mode") != off
        ]
        found.append(f"{len(ran)} of {len(layers)} layers compiled" if layers else "no layer compiled")
        if GRAPHS in arm.env and layers:
            found.append(f"CUDA graphs {_graphs(type(layers[0]).forward)}")
    if SKIP in arm.lora:
        kept = sum("_unsloth_skip_checkpoint" in module.__dict__ for module in model.modules())
        found.append(f"{kept} layers not checkpointed")
    return ", ".join(found)


def _graphs(forward: Callable) -> str:
    """Counts the shapes for which a compiled layer class has CUDA graphs; Unsloth disables them after too many."""
    run = inspect.getclosurevars(forward).nonlocals.get("run")
    kept = {} if run is None else inspect.getclosurevars(run).nonlocals
    if not {"graph_shapes", "graphs_off"} <= kept.keys():
        return "not counted: this Unsloth keeps them elsewhere"
    return f"{'given up at' if kept['graphs_off'][0] else 'of'} {len(kept['graph_shapes'])} shapes"
