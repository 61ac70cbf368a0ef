"""Hooks the MLP and the O projection of a layer for row sparsity, in both backends, where it runs part by part.

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
from sparse_unsloth.model.training_flags import in_backward, training_mode
from sparse_unsloth.ops.projection import read_base
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.runtime.state import LayerRuntime


def install(runtime: LayerRuntime) -> None:
    """Hooks the MLP and the O projection of a layer.

    Raises:
        AttachError: see `probe`.
    """
    install_mlp(runtime)
    module = runtime.layer.self_attn.o_proj
    probe(runtime.layer, "self_attn.o_proj", module)
    replace_forward(module, output_forward, runtime)


def install_mlp(runtime: LayerRuntime) -> None:
    """Hooks the MLP.

    Raises:
        AttachError: see `probe`.
    """
    module = runtime.layer.mlp
    probe(runtime.layer, "mlp", module)
    replace_forward(module, mlp_forward, runtime)


def mlp_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The module's own forward, whose backward selects the layer's rows and goes through them."""
    runtime: LayerRuntime = self._sparse_runtime
    choice = None if args or kwargs else runtime.row_choice(self, hidden_states)
    if choice is None:
        return original_forward(self, hidden_states, *args, **kwargs)
    output_unused = is_output_unused(runtime)
    runtime.record_run("mlp")
    if not torch.is_grad_enabled():
        return original_forward(self, hidden_states)
    rows = BackwardRows(choice, skip_output=output_unused)
    return backward_rows(partial(original_forward, self), [hidden_states], trained(self), rows)


def output_forward(self: nn.Module, attention_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The O projection's own forward, whose backward goes through the rows that the MLP's backward selected."""
    runtime: LayerRuntime = self._sparse_runtime
    choice = None if args or kwargs else runtime.row_choice(self, attention_output)
    if choice is None:
        return original_forward(self, attention_output, *args, **kwargs)
    return run_output_projection(partial(original_forward, self), attention_output, self, choice, runtime)


def run_output_projection(
    function: Callable[[Tensor], Tensor], attention_output: Tensor, module: nn.Module, choice: RowChoice, runtime
) -> Tensor:
    """Runs ``function``, the forward of the O projection ``module``, with backward through the rows of ``choice``."""
    runtime.record_run("self_attn")
    if not torch.is_grad_enabled():
        return function(attention_output)
    return backward_rows(function, [attention_output], trained(module), BackwardRows(choice, select_rows=False))


def is_output_unused(runtime: LayerRuntime) -> bool:
    """Whether this is a recompute, in which the MLP's output is unused (docs/how-it-works.md, section 5.3).

    It is one if the layer ran in this forward before, and runs again, with gradients, within a backward pass.
    """
    recompute = in_backward() and torch.is_grad_enabled() and (runtime.layer.index, "mlp") in runtime.context.ran
    return recompute and runtime.state.config.exact_removal and runtime.layer.adds_mlp_output


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of ``modules``."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def probe(layer: DecoderLayer, name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Proves that ``function``, the forward of module ``name``, works row by row and is deterministic.

    Raises:
        AttachError: it is not (dropout, or experts with a capacity), so backward could not recompute chosen rows.
    """
    refuse_dropout(layer)
    where = f"{layer.name}.{name}"
    base = read_base(layer.projections()["mlp.gate_proj" if name == "mlp" else name], where)
    x = probe_rows(base)
    rows = torch.arange(1, PROBE_TOKENS, 2, device=x.device)
    # In training mode: in evaluation bitsandbytes may repack 4-bit weights on a CPU for good.
    with torch.enable_grad(), training_mode(layer.module):
        whole = function(x)
        with torch.no_grad():
            chosen = function(x[:, rows])
    if not isinstance(whole, Tensor):
        raise AttachError(f"{where}: returns a {type(whole).__name__}, so backward_rows has no path for it.")
    refuse_foreign_leaves(where, whole, trained(layer.module.get_submodule(name)))
    error, tolerance = difference(chosen, whole.detach()[:, rows]), allowed(whole.dtype)
    if not error <= tolerance:
        raise AttachError(
            f"{where}: some rows, computed alone, differ by {error:.2g} (allowed {tolerance}) from the same rows among "
            "others, and backward_rows computes some twice. Set lora_dropout (and other dropout) to 0, or leave "
            "backward_rows out."
        )
