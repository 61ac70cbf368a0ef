"""Hooks the row parts of a layer for row sparsity, in both backends, where it runs part by part.

Each runs the model's own forward, and its backward goes through chosen rows (docs/how-it-works.md, sections 3.1
and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import original_forward, replace_forward
from sparse_unsloth.backends.probes import PROBE_TOKENS, allowed, probe_rows
from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.probe import difference
from sparse_unsloth.model.adapters import refuse_dropout, refuse_foreign_leaves
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.model.row_parts import RowPart
from sparse_unsloth.model.training_flags import in_backward, training_mode
from sparse_unsloth.ops.projection import read_base
from sparse_unsloth.rows.backward import BackwardRows, backward_rows, refuse_gradient
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.rows.routing import KeptChoices
from sparse_unsloth.runtime.state import LayerRuntime


def install(runtime: LayerRuntime) -> None:
    """Hooks the row parts of a layer.

    Raises:
        AttachError: see `probe`; parts of a layer of another kind are proved when it is described.
    """
    for part in runtime.layer.row_parts:
        install_part(runtime, part)


def install_part(runtime: LayerRuntime, part: RowPart) -> None:
    """Hooks one part; raises as `install`."""
    if isinstance(runtime.layer, DecoderLayer):
        probe(runtime.layer, part, part.module)
    part.module.__dict__["_sparse_part"] = part
    replace_forward(part.module, part_forward, runtime)


def part_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, whose backward goes through the layer's rows; the layer's last part selects them."""
    runtime: LayerRuntime = self._sparse_runtime
    part: RowPart = self._sparse_part
    call = _Call(partial(original_forward, self), args, kwargs)
    inputs = call.inputs
    choice = runtime.row_choice(self, *inputs.values())
    if choice is not None and tuple(inputs) != part.inputs:
        runtime.state.warn_once(
            f"{runtime.layer.name}.{part.path or part.name} was called with other tensors than when it was attached "
            f"({', '.join(map(str, inputs))} instead of {', '.join(map(str, part.inputs))}); such calls are dense."
        )
        choice = None
    if choice is None:
        return original_forward(self, *args, **kwargs)
    output_unused = is_output_unused(runtime, part)
    call.choice = choice
    if part.is_routed:
        call.kept = runtime.context.memo(runtime.layer.index).choices[part.name]
    runtime.record_run(part.name)
    if not torch.is_grad_enabled():
        output = call(*inputs.values())
        return output if call.side is None else (output, *call.side)
    rows = BackwardRows(choice, select_rows=part.selects_rows, skip_output=output_unused)
    output = backward_rows(call, list(inputs.values()), trained(self), rows)
    if call.side is None:
        return output
    where = f"{runtime.layer.name}.{part.name}"
    return output, *(refuse_gradient(value, output, where) for value in call.side)


class _Call:
    """One call of a module as a function of its tensors of rows, which backward calls again for chosen rows.

    Attributes:
        inputs: the tensors among its arguments, by number or name.
        kept: the choices of a routed module for each row (`KeptChoices`); None for others.
        choice: the rows that backward goes through.
        side: what the module returned beside its output; None where it returns one tensor.
    """

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any]):
        self._function, self._num_args = function, len(args)
        self._given = {**dict(enumerate(args)), **kwargs}
        self.inputs = {name: value for name, value in self._given.items() if isinstance(value, Tensor)}
        self.kept: list[Tensor] | None = None
        self.choice: RowChoice | None = None
        self.side: tuple | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        given = {**self._given, **dict(zip(self.inputs, tensors, strict=True))}
        args = [given.pop(place) for place in range(self._num_args)]
        if self.kept is None:
            output = self._function(*args, **given)
        else:
            shape = self.choice.partition.shape
            rows = self.choice.rows if torch.is_grad_enabled() else None  # in backward
            with KeptChoices(self.kept, shape[0] * shape[1], rows):
                output = self._function(*args, **given)
        if not isinstance(output, tuple):
            return output
        if not torch.is_grad_enabled():
            self.side = output[1:]
        return output[0]


def is_output_unused(runtime: LayerRuntime, part: RowPart) -> bool:
    """Whether this is a recompute, in which the MLP's output is unused (docs/how-it-works.md, section 5.3).

    It is one if the layer ran in this forward before, and runs again, with gradients, within a backward pass.
    """
    ran = part.name == "mlp" and (runtime.layer.index, "mlp") in runtime.context.ran
    recompute = ran and in_backward() and torch.is_grad_enabled()
    return recompute and runtime.state.config.exact_removal and runtime.layer.adds_mlp_output


def run_output_projection(
    function: Callable[[Tensor], Tensor], attention_output: Tensor, module: nn.Module, choice: RowChoice, runtime
) -> Tensor:
    """Runs ``function``, the forward of the O projection ``module``, with backward through the rows of ``choice``."""
    runtime.record_run("self_attn")
    if not torch.is_grad_enabled():
        return function(attention_output)
    return backward_rows(function, [attention_output], trained(module), BackwardRows(choice, select_rows=False))


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of ``modules``."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def probe(layer: DecoderLayer, part: RowPart, function: Callable[[Tensor], Tensor]) -> None:
    """Proves that ``function``, the forward of ``part``, works row by row and is deterministic.

    Raises:
        AttachError: it is not (dropout, or experts with a capacity), so backward could not recompute chosen rows.
    """
    refuse_dropout(layer)
    where = f"{layer.name}.{part.path or part.name}"
    base = read_base(layer.projections()[part.path or "mlp.gate_proj"], where)
    x = probe_rows(base)
    rows = torch.arange(1, PROBE_TOKENS, 2, device=x.device)
    # In training mode: in evaluation bitsandbytes may repack 4-bit weights on a CPU for good.
    with torch.enable_grad(), training_mode(layer.module):
        whole = function(x)
        with torch.no_grad():
            chosen = function(x[:, rows])
    if not isinstance(whole, Tensor):
        raise AttachError(f"{where}: returns a {type(whole).__name__}, so backward_rows has no path for it.")
    refuse_foreign_leaves(where, whole, trained(part.module))
    error, tolerance = difference(chosen, whole.detach()[:, rows]), allowed(whole.dtype)
    if not error <= tolerance:
        raise AttachError(
            f"{where}: some rows, computed alone, differ by {error:.2g} (allowed {tolerance}) from the same rows among "
            "others, and backward_rows computes some twice. Set lora_dropout (and other dropout) to 0, or leave "
            "backward_rows out."
        )
