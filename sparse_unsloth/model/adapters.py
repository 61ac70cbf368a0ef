"""Refuses PEFT adapters that the sparse paths do not compute: all but LoRA and its row-wise variants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.decoder_layer import AnyLayer
from sparse_unsloth.model.row_parts import RowLayer

ROW_BY_ROW = ("DoraLinearVariant", "BdLoraLinearVariant", "MiCALinearVariant")
"""PEFT's LoRA variants whose forward is row-wise, deterministic, and takes no arguments of the batch."""
NO_PATH = "has no sparse path: its weights would get a wrong gradient or none, without a word"
PLAIN_LORA = "Train plain LoRA (peft.LoraConfig), or train dense (sparsity=None)"


def refuse_other_adapters(model: nn.Module, layers: Iterable[AnyLayer]) -> None:
    """Refuses every adapter except LoRA, naming it. `sparse_unsloth.ops.projection.check_adapters` checks LoRA options.

    LoRA on a parameter works where the model's own code computes the layer, as it computes every `RowLayer`.

    Args:
        model: the outermost model.
        layers: the decoder layers with a sparse path; other layers may have any adapter.

    Raises:
        AttachError: soft prompts, another tuner, or a LoRA variant that is not row-wise.
    """
    for name, config in _adapter_configs(model):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind == "ADAPTION_PROMPT":
            raise AttachError(
                f"adapter {name!r} is {kind} ({type(config).__name__}): soft prompts and prefixes put rows in front of "
                f"the tokens, or in their keys and values, that no label belongs to. {PLAIN_LORA}."
            )
        if kind != "LORA":
            raise AttachError(f"adapter {name!r} is {kind} ({type(config).__name__}), which {NO_PATH}. {PLAIN_LORA}.")
    for layer in layers:
        for name, module in layer.module.named_modules():
            if hasattr(module, "adapter_layer_names"):
                _refuse_layer(f"{layer.name}.{name}", module, isinstance(layer, RowLayer))


def refuse_dropout(layer: AnyLayer) -> None:
    """Refuses dropout, which the probe of `sparse_unsloth.backends.row_hooks` cannot see while an adapter's B is zero.

    Raises:
        AttachError: a row part has active dropout.
    """
    for part in layer.row_parts:
        inactive = {id(dropout) for module in part.module.modules() for dropout in _inactive_dropouts(module)}
        for module in part.module.modules():
            if isinstance(module, nn.Dropout) and module.p > 0 and id(module) not in inactive:
                raise AttachError(
                    f"{layer.name}.{part.path or part.name}: drops out {module.p:g} of its inputs, different ones each "
                    "time, and backward_rows computes some rows twice. Set lora_dropout (and other dropout) to 0, or "
                    "leave backward_rows out."
                )


def active_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of ``module``, by name, without those of inactive adapters."""
    inactive: set[nn.Parameter] = set()
    for part in module.modules():
        names = getattr(part, "adapter_layer_names", None)
        if names is None:
            continue
        idle = bool(getattr(part, "merged", False) or getattr(part, "disable_adapters", False))
        for holder in (getattr(part, name, None) for name in names):
            for adapter, value in holder.items() if hasattr(holder, "items") else ():
                if idle or adapter not in part.active_adapters:
                    inactive |= set(value.parameters()) if isinstance(value, nn.Module) else {value}
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter not in inactive
    }


def refuse_foreign_leaves(where: str, output: Tensor, known: Iterable[nn.Parameter]) -> None:
    """Refuses a function that depends on trained tensors to which its sparse path would give no gradient.

    Args:
        where: the function's name.
        output: its output, computed with gradients enabled.
        known: the trained tensors that its sparse path knows.

    Raises:
        AttachError: there are others, for example an adapter in another module that a hook adds.
    """
    known = set(known)
    nodes, seen, foreign = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and node.variable not in known:
            foreign.append(list(node.variable.shape))
        nodes += [parent for parent, _ in node.next_functions]
    if foreign:
        raise AttachError(
            f"{where}: its output depends on {len(foreign)} trained tensors (of shape "
            f"{', '.join(map(str, foreign[:4]))}) that its sparse path does not know: a hook adds them, or they lie in "
            f"another module. They would get no gradient, without a word. {PLAIN_LORA}."
        )


def _adapter_configs(model: nn.Module) -> Iterator[tuple[str, object]]:
    for module in model.modules():
        for slot in ("peft_config", "_peft_config"):
            found = vars(module).get(slot)
            yield from (
                (name, config)
                for name, config in (found.items() if isinstance(found, dict) else ())
                if hasattr(config, "peft_type")
            )


def _refuse_layer(where: str, module: nn.Module, allows_parameters: bool) -> None:
    """Refuses a PEFT layer (one with ``adapter_layer_names``) whose forward is not that of a LoRA projection."""
    kind = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    home = kind.__module__
    if home == "peft.utils.other":  # modules_to_save: a fully trained copy
        return
    if kind.__name__ == "ParamWrapper":
        if allows_parameters:
            return
        raise AttachError(
            f"{where}: LoRA on a parameter (ParamWrapper, target_parameters) {NO_PATH}. Name modules in target_modules."
        )
    if not home.startswith("peft.tuners.lora."):
        tuner = home.removeprefix("peft.tuners.").partition(".")[0]
        raise AttachError(f"{where}: an adapter of the kind {tuner} ({kind.__name__}) {NO_PATH}. {PLAIN_LORA}.")
    for adapter, variant in getattr(module, "lora_variant", {}).items():
        name = type(variant).__name__
        if name not in ROW_BY_ROW and adapter in module.active_adapters:
            option = " (alora_invocation_tokens)" if name == "ALoraLinearVariant" else ""
            raise AttachError(
                f"{where}: adapter {adapter!r} uses the LoRA variant {name}{option}, which {NO_PATH}. {PLAIN_LORA}."
            )


def _inactive_dropouts(module: nn.Module) -> list[nn.Module]:
    """The dropouts of the inactive LoRA adapters of ``module``."""
    dropouts = getattr(module, "lora_dropout", {})
    return [dropouts[name] for name in dropouts if name not in module.active_adapters]
