"""Loads models and adds LoRA without Unsloth, with Unsloth's arguments."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from sparse_unsloth.errors import BackendError
from sparse_unsloth.tokens.partition import is_sequence_classifier
from sparse_unsloth.utils.distributed import local_rank, uses_fsdp, world_size
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.saved_adapters import base_not_loaded, base_of, find_adapter, tokenizer_of, vocabulary_of

logger = logging.getLogger("sparse_unsloth")

NAME = "peft"
NEEDS_UNSLOTH = ("full_finetuning", "load_in_8bit", "load_in_fp8", "fast_inference", "qat_scheme", "unsloth_tiled_mlp")
"""Arguments of Unsloth's loader that this backend does not support."""

IGNORED = (
    "fix_tokenizer", "use_exact_model_name", "offload_embedding", "float32_mixed_precision", "gpu_memory_utilization",
    "float8_kv_cache", "max_lora_rank", "disable_log_stats", "device_map_planner_kwargs", "load_in_16bit", "text_only",
)  # fmt: skip
"""Arguments of Unsloth's loader that only tune Unsloth: accepted and ignored, so that scripts need no change."""

OF_UNSLOTHS_LORA = (
    "finetune_vision_layers", "finetune_language_layers", "finetune_audio_layers", "finetune_attention_modules",
    "finetune_mlp_modules", "checkpoint_skip_layers", "offload_layers",
)  # fmt: skip
"""Arguments of Unsloth's ``get_peft_model`` that neither this backend nor PEFT has."""


def load(
    model_name: str,
    max_seq_length: int | None,
    dtype: torch.dtype | None,
    load_in_4bit: bool,
    *,
    token: str | None = None,
    device_map: Any = "sequential",
    rope_scaling: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    use_gradient_checkpointing: bool | str = "unsloth",
    resize_model_vocab: int | None = None,
    revision: str | None = None,
    random_state: int = 3407,
    auto_model: Any = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Loads a transformers model and its tokenizer; an adapter folder gives a trainable ``PeftModel`` over its base.

    A multimodal checkpoint gives the model with its towers, and its processor instead of the tokenizer, where it has
    one, as Unsloth does.

    The base is resized to the number of token embeddings that were saved with the adapter. An adapter folder without a
    tokenizer gives the base's tokenizer.

    ``auto_model`` is the class that loads the model, as in Unsloth's ``FastModel``: by default
    ``AutoModelForCausalLM``, or for a multimodal checkpoint ``AutoModelForImageTextToText`` or
    ``AutoModelForMultimodalLM``; ``AutoModelForSequenceClassification`` for a classifier (with ``config=``, which sets
    the labels).

    Raises:
        BackendError: an argument that only Unsloth supports, ``max_seq_length`` exceeds the model's positions, or the
            adapter was trained with another vocabulary than ``resize_model_vocab``.
        DataError: the adapter is damaged, or its base model cannot be loaded.
        InstallError: gguf is missing, for ``gguf_file``.
    """
    from peft import PeftModel
    from transformers import AutoConfig, BitsAndBytesConfig, set_seed

    unsupported = [name for name in NEEDS_UNSLOTH if kwargs.pop(name, None)]
    if unsupported:
        raise BackendError(
            f"The PEFT backend has no {', '.join(unsupported)}. Use backend='unsloth' on a CUDA GPU, or leave it out."
        )
    for name in IGNORED:
        kwargs.pop(name, None)
    set_seed(random_state)
    hub = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
    adapter = find_adapter(model_name)
    vocabulary = None
    if adapter is not None:
        model_name, vocabulary = base_of(adapter), vocabulary_of(adapter)
        if None not in (vocabulary, resize_model_vocab) and vocabulary != resize_model_vocab:
            raise BackendError(
                f"resize_model_vocab={resize_model_vocab}: the adapter in {adapter} was trained with {vocabulary} "
                "token embeddings, which are stored beside it. Leave resize_model_vocab out."
            )
    if dtype is None:
        dtype = _default_dtype()
    gguf = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
    if gguf:
        require("gguf", "gguf_file", "gguf")
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(model_name, **hub, **gguf)
    except (OSError, ValueError) as error:
        if adapter is None:
            raise
        raise base_not_loaded(adapter, error) from error
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if rope_scaling is not None:
        text.rope_scaling = rope_scaling
    elif max_seq_length is None:
        max_seq_length = positions
    elif positions is not None and max_seq_length > positions:
        raise BackendError(
            f"max_seq_length={max_seq_length} is beyond the {positions} positions of "
            f"{model_name}. Lower it (a recipe's max_length), or give rope_scaling="
            "{'rope_type': 'linear', 'factor': 2.0}."
        )
    if load_in_4bit and "quantization_config" not in kwargs and getattr(config, "quantization_config", None) is None:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device_map == "sequential":  # Unsloth's default: one device
        device_map = {"": _device()} if torch.cuda.is_available() and (load_in_4bit or not uses_fsdp()) else None
    try:
        model = (auto_model or _auto_model(config)).from_pretrained(
            model_name, config=config, dtype=dtype, device_map=device_map, **hub, **kwargs
        )
    except OSError as error:
        if adapter is None:
            raise
        raise base_not_loaded(adapter, error) from error
    source = model_name if adapter is None else tokenizer_of(adapter)
    processor = _processor(source, config, hub, gguf if source == model_name else {})
    tokenizer = getattr(processor, "tokenizer", processor)
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary is not None and vocabulary != rows:
        # The adapter's own embeddings replace them, so the initial values do not matter.
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    elif resize_model_vocab is not None:
        model.resize_token_embeddings(resize_model_vocab)
    elif adapter is not None and len(tokenizer) > rows:
        raise BackendError(
            f"{adapter}: its tokenizer has {len(tokenizer)} tokens and the base model {model_name} {rows} embeddings: "
            "the embeddings of the training were not saved with it. Save the adapter again with "
            f"save_embedding_layers=True, or give resize_model_vocab={len(tokenizer)} to begin with new ones."
        )
    model.max_seq_length = max_seq_length
    if adapter is not None:
        _prepare(model, use_gradient_checkpointing)
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        model.max_seq_length = max_seq_length
    return model, processor


def _auto_model(config: Any) -> Any:
    """The class of transformers that loads a model with ``config``, with the towers that it was saved with.

    Raises:
        BackendError: there is none, so the model generates no text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    causal, *multimodal = AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    saved_with_towers = any(name.endswith("ForConditionalGeneration") for name in config.architectures or ())
    order = [*multimodal, causal] if saved_with_towers and not remote else [causal, *multimodal]
    found = next((auto for auto in order if remote or type(config) in auto._model_mapping), None)
    if found is None:
        raise BackendError(
            f"{type(config).__name__}: transformers has no model of this kind that generates text. Name the class that "
            "loads it (auto_model=)."
        )
    return found


def _processor(source: str, config: Any, hub: dict[str, Any], gguf: dict[str, Any]) -> Any:
    """The tokenizer; of a multimodal model its processor, where ``source`` has one."""
    from transformers import AutoProcessor, AutoTokenizer

    if config.get_text_config() is not config:
        try:
            return AutoProcessor.from_pretrained(source, **hub)
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            logger.warning("No processor of images was loaded (%s); the tokenizer alone is returned.", first)
    return AutoTokenizer.from_pretrained(source, **hub, **gguf)


def add_lora(
    model: nn.Module,
    *,
    r: int,
    target_modules: list[str] | str,
    lora_alpha: int,
    lora_dropout: float,
    bias: str,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: str | None = None,
    finetune_last_n_layers: int | None = None,
    use_gradient_checkpointing: bool | str = "unsloth",
    random_state: int = 3407,
    use_rslora: bool = False,
    modules_to_save: list[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: dict[str, Any] | None = None,
    max_seq_length: int | None = None,
    temporary_location: str | None = None,
    qat_scheme: str | None = None,
    task_type: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Adds LoRA adapters through PEFT, with Unsloth's arguments.

    A list of target modules means those of the text decoder (and its head): the towers of a multimodal model stay as
    they are, unless ``exclude_modules`` is given, or a pattern for ``target_modules``.

    Other arguments go to ``LoraConfig``, which raises for unknown ones. ``max_seq_length`` and ``temporary_location``
    have no effect, as in present Unsloth versions.

    Raises:
        BackendError: ``qat_scheme``, which only Unsloth supports, or a model that has adapters already.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if qat_scheme is not None:
        raise BackendError("The PEFT backend has no qat_scheme. Use backend='unsloth' on a CUDA GPU, or leave it out.")
    if hasattr(model, "peft_config"):
        raise BackendError("The model has adapters already; attach(model, sparsity) makes them sparse.")
    if finetune_last_n_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers_to_transform = list(range(count - finetune_last_n_layers, count))
    towers = None if isinstance(target_modules, str) else _outside_text_decoder(model)
    if towers is not None:
        kwargs.setdefault("exclude_modules", towers)
    set_seed(random_state)
    _prepare(model, use_gradient_checkpointing)
    config = LoraConfig(
        # PEFT trains and saves the head of a classifier whole.
        task_type=task_type or ("SEQ_CLS" if is_sequence_classifier(model) else "CAUSAL_LM"),
        r=r,
        target_modules=target_modules,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        use_rslora=use_rslora,
        modules_to_save=modules_to_save,
        init_lora_weights=init_lora_weights,
        loftq_config=loftq_config or {},
        **kwargs,
    )
    wrapped = get_peft_model(model, config)
    wrapped.max_seq_length = getattr(model, "max_seq_length", None)
    return wrapped


def for_training(model: nn.Module, use_gradient_checkpointing: bool | str | None = None) -> nn.Module:
    """Sets training mode and gradient checkpointing; None keeps the checkpointing mode."""
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif use_gradient_checkpointing is not None:
        model.gradient_checkpointing_disable()
    return model.train()


def for_inference(model: nn.Module) -> nn.Module:
    """Sets evaluation mode."""
    return model.eval()


def _prepare(model: nn.Module, use_gradient_checkpointing: bool | str) -> None:
    """Freezes the base and turns gradient checkpointing on; "unsloth" means plain checkpointing here.

    Norms and embeddings of a 4-bit base keep their dtype, as with Unsloth; PEFT's own preparation casts them to
    float32, and with them the residual stream, which whole layers do not take.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def _outside_text_decoder(model: nn.Module) -> str | None:
    """A pattern of the modules outside the text decoder and its head; None for a model of text alone."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if name and module is decoder), None)
    return None if prefix is None else rf"(?!{re.escape(prefix)}\.|lm_head$).*"


def _device() -> int:
    """The GPU of this process; a script may load the model before the trainer's arguments set torch's device."""
    return local_rank() if world_size() > 1 else torch.cuda.current_device()


def _default_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
