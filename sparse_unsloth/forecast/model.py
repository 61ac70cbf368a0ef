"""Reads a model without its weights: builds its configuration on the meta device, with the recipe's adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_unsloth.costs.flops import ATTENTION, MLP, ModelShape
from sparse_unsloth.data.smollm2 import resolve_base, resolve_tokenizer
from sparse_unsloth.errors import ConfigError, DataError, SparsityError
from sparse_unsloth.utils.saved_adapters import check_targets, named_targets
from sparse_unsloth.utils.unreadable import first_line

if TYPE_CHECKING:
    from sparse_unsloth.training.recipe import Recipe

UNSLOTH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Families that Unsloth runs on its fast path, by ``model_type``."""
LLAMA_LAYERS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers run as whole layers with either backend."""
WHOLE_LAYERS = {
    "unsloth": LLAMA_LAYERS,
    "peft": (
        *LLAMA_LAYERS, "ministral3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3", "olmo2", "exaone4",
    ),
}  # fmt: skip
"""Families whose layers run as whole layers on a GPU, by backend (docs/how-it-works.md, section 7)."""


@dataclass(frozen=True)
class Model:
    """The properties of a model that decide the cost of its training.

    Attributes:
        name: the recipe's name of it; ``model_type`` is transformers' name of its family.
        shape: its sizes.
        linear: frozen parameters of the decoder layers' linear modules, which 4-bit loading quantises.
        other: all other frozen parameters: embeddings, norms, head (a tied head counts once).
        adapter: the number of trained parameters.
        lora_targets: which of the seven projections have an adapter.
        layers: ``(mlp, self_attn)`` sparsity of each layer under the recipe.
        in_4bit: whether the base weights are loaded in 4 bits.
        weight_bytes: bytes of a parameter that is not in 4 bits.
        eager_attention: whether attention is computed without a fused kernel.
    """

    name: str
    model_type: str
    shape: ModelShape
    linear: int
    other: int
    adapter: int
    lora_targets: tuple[str, ...]
    layers: tuple[tuple[float, float], ...]
    in_4bit: bool
    weight_bytes: int
    eager_attention: bool


def read_model(recipe: Recipe) -> tuple[Model, Any]:
    """Reads the model of ``recipe`` and its tokenizer.

    Raises:
        DataError: configuration or tokenizer cannot be loaded.
        AttachError: the model has no layers with a sparse path, or the recipe's adapters have none.
        ConfigError: the recipe names layers or modules that the model does not have.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sparse_unsloth.backends.probes import check
    from sparse_unsloth.model.adapters import refuse_dropout
    from sparse_unsloth.model.decoder_layer import find_layers

    arguments, training = recipe.model, recipe.training
    config, tokenizer = _configuration(recipe)
    shape = ModelShape.from_config(config)
    layers = recipe.sparsity.layer_sparsity(shape.num_layers)
    quantised = vars(config).pop("quantization_config", None)
    with _quiet():
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=training.trust_remote_code)
        except ValueError as error:
            raise ConfigError(f"{arguments.model_name_or_path}: {error}") from error
        found = find_layers(model)
        frozen = sum(parameter.numel() for parameter in model.parameters())
        linear = sum(
            module.weight.numel()
            for layer in found
            for module in layer.module.modules()
            if isinstance(module, torch.nn.Linear)
        )
        targets = named_targets(arguments.lora_target_modules) or [*ATTENTION, *MLP]
        check_targets(model, targets)
        check_targets(model, arguments.lora_modules_to_save, "lora_modules_to_save")
        try:
            model = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=arguments.lora_r,
                    lora_alpha=arguments.lora_alpha,
                    lora_dropout=arguments.lora_dropout,
                    target_modules=targets,
                    modules_to_save=arguments.lora_modules_to_save,
                    use_dora=arguments.use_dora,
                ),
            )
        except ValueError as error:
            raise ConfigError(f"{arguments.model_name_or_path}: {error}") from error
    found = find_layers(model)
    for layer, sparsity in zip(found, layers, strict=True):
        for part in ("mlp", "self_attn"):
            if getattr(sparsity, part) > 0:
                check(layer, part)
        if recipe.sparsity.row_sparse:
            refuse_dropout(layer)
    projections = found[0].projections()
    _check_length(recipe, config)
    return Model(
        name=arguments.model_name_or_path,
        model_type=config.get_text_config().model_type,
        shape=shape,
        linear=linear,
        other=frozen - linear,
        adapter=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        lora_targets=tuple(name.partition(".")[2] for name, module in projections.items() if hasattr(module, "lora_A")),
        layers=tuple(tuple(layer) for layer in layers),
        in_4bit=arguments.load_in_4bit or bool(quantised and dict(_mapping(quantised)).get("load_in_4bit")),
        weight_bytes=_weight_bytes(recipe, config),
        eager_attention=arguments.attn_implementation == "eager",
    ), tokenizer


def backend_of(recipe: Recipe, model_type: str, on_cpu: bool) -> tuple[str, str]:
    """Returns ``(backend, reason)`` for the machine that will train: "auto" is Unsloth where a GPU could run it.

    On Unsloth's compiled path the PEFT backend's layers run, so a step is estimated as one of theirs.
    """
    fast = model_type in UNSLOTH_FAMILIES
    if recipe.backend == "peft" or (recipe.backend == "unsloth" and fast):
        return recipe.backend, "as asked"
    if recipe.backend == "auto" and on_cpu:
        return "peft", "use_cpu"
    compiled = f"whose layers run on Unsloth's compiled path, which {model_type} takes"
    return ("unsloth", "as on a CUDA GPU") if fast else ("peft", compiled)


def has_whole_layers(recipe: Recipe, model_type: str, backend: str) -> bool:
    """Whether the decoder layers run as whole layers."""
    plain_lora = recipe.model.lora_dropout == 0 and not recipe.model.use_dora
    return not recipe.training.use_cpu and plain_lora and model_type in WHOLE_LAYERS[backend]


def _configuration(recipe: Recipe) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    arguments = recipe.model
    name = arguments.model_name_or_path
    hub = {"revision": arguments.model_revision, "trust_remote_code": recipe.training.trust_remote_code}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(resolve_base(name), **hub)
            tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer(name), **hub)
    except SparsityError:
        raise
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"model_name_or_path: configuration and tokenizer of {name!r} cannot be read: {reason}. It "
            "must be a folder with a transformers checkpoint or a LoRA adapter, or a hub name that can be reached "
            "from here. (Their few small files suffice: no weights are needed.)"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def _check_length(recipe: Recipe, config: Any) -> None:
    limit, asked = getattr(config.get_text_config(), "max_position_embeddings", None), recipe.training.max_length
    if limit is not None and asked is not None and asked > limit:
        raise ConfigError(
            f"max_length: {asked} is beyond the {limit} positions of {recipe.model.model_name_or_path}; lower it."
        )


def _weight_bytes(recipe: Recipe, config: Any) -> int:
    import torch

    asked = recipe.model.dtype
    dtype = getattr(config, "dtype", None) if asked in (None, "auto") else getattr(torch, asked)
    if asked in (None, "auto") and not recipe.training.use_cpu:
        return 2  # the backends load bfloat16 or float16 on a GPU
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def _mapping(quantised: Any) -> Any:
    return quantised if isinstance(quantised, dict) else vars(quantised)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
