"""Hook points of plain transformers models with PEFT adapters: the MLP's forward, and each attention projection's.

Only instances are changed, never classes. A replaced forward stays on the module, and is called whenever the masked
forward does not apply: no context (evaluation, generation, dense phases), adapters merged, disabled or several active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sparse_unsloth.adapters import refuse_foreign_leaves
from sparse_unsloth.backends import row_hooks
from sparse_unsloth.backends.replaced import original_forward, replace_forward, runs
from sparse_unsloth.channel_selections import AttentionSelection
from sparse_unsloth.distributed import local_rank, uses_fsdp, world_size
from sparse_unsloth.errors import AttachError, BackendError
from sparse_unsloth.functions.linear import SelectedProjection, sparse_linear
from sparse_unsloth.functions.mlp import GatedMlp, sparse_mlp
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.modes import training_flags
from sparse_unsloth.partition import TokenPartition, is_sequence_classifier
from sparse_unsloth.saved_adapters import base_not_loaded, base_of, find_adapter, tokenizer_of, vocabulary_of
from sparse_unsloth.weights import Projection, check_adapters, check_frozen, read_base, read_projection

NAME = "peft"
PROBE_TOKENS = 8


def install(runtime: LayerRuntime) -> None:
    """Hooks what the layer's sparsity asks for, and lists the modules in ``runtime.state.hooked``.

    Raises:
        AttachError: a projection that the sparse functions cannot compute, or one that they compute differently.
    """
    layer = runtime.layer
    if runtime.state.by_rows:
        row_hooks.install(runtime)
        return
    if runtime.sparsity.mlp > 0:
        check(layer, "mlp")
        probe_mlp(layer)
        replace_forward(layer.mlp, mlp_forward, runtime)
    if runtime.sparsity.self_attn > 0:
        check(layer, "self_attn")
        for name in ATTENTION_PROJECTIONS:
            module = getattr(layer.self_attn, name)
            probe_projection(f"{layer.name}.self_attn.{name}", module)
            module.__dict__["_sparse_projection"] = name
            replace_forward(module, _projection_forward, runtime)


def uninstall(module: nn.Module) -> None:
    """Gives ``module`` the forward back that `install` replaced."""
    original = module.__dict__.pop("_sparse_original")
    module.__dict__.pop("_sparse_runtime")
    module.__dict__.pop("_sparse_projection", None)
    if original is None:
        module.__dict__.pop("forward")
    else:
        module.forward = original


def why_not_captured(runtime: LayerRuntime) -> str:
    """See `backends.unsloth.why_not_captured`."""
    return NO_GRAPHS


def is_installed(module: nn.Module) -> bool:
    """Whether the forward that `install` put there is still the one that runs."""
    ours = runs(module, mlp_forward, _projection_forward, row_hooks.mlp_forward, row_hooks.output_forward)
    return ours and "_sparse_runtime" in module.__dict__


def mlp_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    runtime: LayerRuntime = self._sparse_runtime
    partition = runtime.partition("mlp", self, hidden_states)
    projections = None if partition is None else [read_projection(getattr(self, name)) for name in MLP_PROJECTIONS]
    if projections is None or None in projections:
        return original_forward(self, hidden_states, *args, **kwargs)
    channels = runtime.mlp_channels(hidden_states, partition)
    runtime.record_run("mlp")
    return sparse_mlp(
        hidden_states,
        partition,
        channels,
        GatedMlp(*projections, runtime.layer.activation),
        runtime.context.memo(runtime.layer.index),
        output_is_added=runtime.state.config.exact_removal and runtime.layer.adds_mlp_output,
    )


def _projection_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    runtime: LayerRuntime = self._sparse_runtime
    name = self._sparse_projection
    partition = runtime.partition("self_attn", self, hidden_states)
    projection = None if partition is None else read_projection(self)
    if projection is None:
        return original_forward(self, hidden_states, *args, **kwargs)
    chosen = runtime.attention_channels(partition, None if name == "o_proj" else hidden_states)
    part = select(projection, name[0], chosen)
    if name == "o_proj":
        runtime.record_run("self_attn")
    (output,) = sparse_linear(hidden_states, partition, [part])
    return output


def refuse_sharded_weights(layer: DecoderLayer) -> None:
    """Refuses weights that are not whole where the sparse functions read them: in the MLP and in each projection.

    FSDP2 gathers a unit's weights while its own forward and backward run, so a unit must be the MLP or hold it (or a
    projection of attention, or hold that): decoder layers do.

    Raises:
        AttachError: FSDP1, DeepSpeed ZeRO-3, or FSDP2 units within the MLP or within a projection.
    """
    for name, module in layer.projections().items():
        inner = list(module.modules())
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            raise AttachError(
                f"{layer.name}.{name}: DeepSpeed ZeRO-3 partitions its weight and gathers it module by module, where "
                "the sparse functions do not look. Use FSDP2 (fsdp_version: 2), ZeRO-2 or DDP."
            )
        if any(is_flattened(part) for part in inner):
            raise AttachError(
                f"{layer.name}.{name}: FSDP1 flattened its weight. Use FSDP2 (fsdp_version: 2 in accelerate's "
                "configuration), or DDP."
            )
        if any(isinstance(part, FSDPModule) for part in inner[0 if name.startswith("mlp") else 1 :]):
            raise AttachError(
                f"{layer.name}.{name}: FSDP2 gathers its weight by itself, after the sparse functions read it. Wrap "
                "whole decoder layers (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)."
            )


def is_flattened(module: nn.Module) -> bool:
    """Whether FSDP1 holds the module's weight: it leaves a view in the parameter's place, or marks the parameter."""
    return "weight" in module.__dict__ or hasattr(getattr(module, "weight", None), "_fsdp_flattened")


def select(projection: Projection, name: str, chosen: AttentionSelection | None) -> SelectedProjection:
    """The projection called ``name`` ("q", "k", "v", "o") with the channels of context rows."""
    channels = None if chosen is None else getattr(chosen, name)
    if name == "o":
        return SelectedProjection(projection, in_index=channels)
    return SelectedProjection(projection, out_index=channels)


def check_adapters_of(runtime: LayerRuntime) -> None:
    """Refuses adapters on the parts that are sparse which their functions do not compute.

    Raises:
        AttachError: dropout, or a variant of LoRA.
    """
    layer = runtime.layer
    if runtime.state.by_rows:
        row_hooks.refuse_dropout(layer)
        return
    for name, module in layer.projections().items():
        if getattr(runtime.sparsity, name.partition(".")[0]) > 0:
            check_adapters(module, f"{layer.name}.{name}")


def check(layer: DecoderLayer, part: str) -> None:
    """Refuses projections that have no exact sparse path.

    Raises:
        AttachError: an unsupported layer type or LoRA variant, or a base weight that is itself trained.
    """
    if part == "self_attn" and not layer.queries_alone:
        raise AttachError(
            f"{layer.name}.self_attn.q_proj: it gives more than the queries that o_proj's input is made of (a gate "
            "beside them, as in Qwen3.5), so its channels cannot be paired with those of k_proj and o_proj. Leave "
            "self_attn out of the configuration; mlp channels and rows (backward_rows) work."
        )
    for name, module in layer.projections().items():
        if not name.startswith(part):
            continue
        where = f"{layer.name}.{name}"
        check_adapters(module, where)
        check_frozen(read_base(module, where), where)


def probe_mlp(layer: DecoderLayer) -> None:
    """Proves that `sparse_mlp` with every channel kept is what the layer's own MLP computes.

    Raises:
        AttachError: it is not (an extra norm, scale or dropout in the MLP, say), or depends on other trained tensors.
    """
    projections = [read_projection(getattr(layer.mlp, name), f"{layer.name}.mlp.{name}") for name in MLP_PROJECTIONS]
    if None in projections:
        raise _not_live(f"{layer.name}.mlp")
    channels = torch.arange(layer.intermediate_size, device=projections[0].base.device)
    mlp = GatedMlp(*projections, layer.activation)
    _compare(layer.mlp, projections, lambda x, partition: sparse_mlp(x, partition, channels, mlp), layer.name)


def probe_projection(where: str, module: nn.Module) -> None:
    """Proves that `sparse_linear` with every channel kept is what the projection itself computes.

    Raises:
        AttachError: it is not.
    """
    projection = read_projection(module, where)
    if projection is None:
        raise _not_live(where)
    channels = torch.arange(projection.base.shape[0], device=projection.base.device)
    part = SelectedProjection(projection, out_index=channels)
    _compare(module, [projection], lambda x, partition: sparse_linear(x, partition, [part])[0], where)


def _compare(
    module: nn.Module, projections: list[Projection], sparse: Callable[[Tensor, TokenPartition], Tensor], where: str
) -> None:
    base = projections[0].base
    dtype = base.weight.dtype if base.quant_state is None else base.quant_state.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, base.shape[1], generator=generator).to(base.device, dtype)
    rows = torch.arange(PROBE_TOKENS, device=base.device)
    half = PROBE_TOKENS // 2
    partition = TokenPartition((1, PROBE_TOKENS), rows[:half], rows[half:], rows[:0], rows[:half])
    # Training flags on: in evaluation bitsandbytes may repack 4-bit weights on a CPU for good.
    with training_flags(module):
        with torch.enable_grad():
            own = module(x)
        refuse_foreign_leaves(
            where, own, (part for one in projections if one.lora for part in (one.lora.A, one.lora.B))
        )
        with torch.no_grad():
            expected, ours = own.detach().float(), sparse(x, partition).float()
    error = ((ours - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    if not error <= tolerance:
        raise AttachError(
            f"{where}: with every channel kept the sparse function differs from the module's own forward by "
            f"{error:.2g} (allowed {tolerance}). {type(module).__name__} computes something else than the projections "
            "and activation found in it, so it has no sparse path; leave this layer dense."
        )


def _not_live(where: str) -> AttachError:
    return AttachError(
        f"{where}: its adapter is merged or disabled, or several are active; attach with one active, unmerged adapter."
    )


NO_GRAPHS = "the PEFT backend hooks parts of layers, and graphs hold whole ones; backend='unsloth' has them"
NEEDS_UNSLOTH = ("full_finetuning", "load_in_8bit", "load_in_fp8", "fast_inference", "qat_scheme", "unsloth_tiled_mlp")
"""Arguments of Unsloth's loader that this backend has nothing for."""

IGNORED = (
    "fix_tokenizer", "use_exact_model_name", "offload_embedding", "float32_mixed_precision", "gpu_memory_utilization",
    "float8_kv_cache", "max_lora_rank", "disable_log_stats", "device_map_planner_kwargs", "load_in_16bit", "text_only",
)  # fmt: skip
"""Arguments of Unsloth's loader that only tune Unsloth itself: accepted, so that a script keeps its call."""


def load(
    model_name: str,
    max_seq_length: int,
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
    """A transformers model and its tokenizer; an adapter folder gives a trainable ``PeftModel`` over its base.

    The base gets as many token embeddings as were saved with the adapter. An adapter's folder without a tokenizer gives
    the base's.

    ``auto_model`` is the class that loads it, as in Unsloth's ``FastModel``: ``AutoModelForCausalLM`` by default,
    ``AutoModelForSequenceClassification`` for a classifier (with ``config=``, which says how many labels).

    Raises:
        BackendError: an argument asks for what only Unsloth does, ``max_seq_length`` exceeds its positions, or the
            adapter was trained with another vocabulary than ``resize_model_vocab``.
        DataError: the adapter is damaged, or its base model cannot be loaded.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

    asked = [name for name in NEEDS_UNSLOTH if kwargs.pop(name, None)]
    if asked:
        raise BackendError(
            f"The PEFT backend has no {', '.join(asked)}. Use backend='unsloth' on a CUDA GPU, or leave it out."
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
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(model_name, **hub, **gguf)
    except (OSError, ValueError) as error:
        if adapter is None:
            raise
        raise base_not_loaded(adapter, error) from error
    if rope_scaling is not None:
        config.rope_scaling = rope_scaling
    elif max_seq_length > config.max_position_embeddings:
        raise BackendError(
            f"max_seq_length={max_seq_length} is beyond the {config.max_position_embeddings} positions of "
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
        model = (auto_model or AutoModelForCausalLM).from_pretrained(
            model_name, config=config, dtype=dtype, device_map=device_map, **hub, **kwargs
        )
    except OSError as error:
        if adapter is None:
            raise
        raise base_not_loaded(adapter, error) from error
    holder = model_name if adapter is None else tokenizer_of(adapter)
    tokenizer = AutoTokenizer.from_pretrained(holder, **hub, **(gguf if holder == model_name else {}))
    tokenizer.model_max_length = max_seq_length
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary is not None and vocabulary != rows:
        # The adapter's own embeddings replace them, so what new ones begin as plays no part.
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    elif resize_model_vocab is not None:
        model.resize_token_embeddings(resize_model_vocab)
    elif adapter is not None and len(tokenizer) > rows:
        raise BackendError(
            f"{adapter}: its tokenizer has {len(tokenizer)} tokens and the base model {model_name} {rows} embeddings: "
            "those that it was trained with were not saved with it. Save the adapter again with "
            f"save_embedding_layers=True, or give resize_model_vocab={len(tokenizer)} to begin with new ones."
        )
    model.max_seq_length = max_seq_length
    if adapter is not None:
        _prepare(model, use_gradient_checkpointing)
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        model.max_seq_length = max_seq_length
    return model, tokenizer


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
    """LoRA adapters through PEFT, with Unsloth's arguments; unknown ones go to ``LoraConfig``, which refuses what it
    does not know. ``max_seq_length`` and ``temporary_location`` mean nothing here, as in today's Unsloth.

    Raises:
        BackendError: ``qat_scheme``, which only Unsloth has, or adapters that are there already.
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
    """Training flags on, and the checkpointing mode asked for (None: as it is)."""
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif use_gradient_checkpointing is not None:
        model.gradient_checkpointing_disable()
    return model.train()


def for_inference(model: nn.Module) -> nn.Module:
    """Training flags off."""
    return model.eval()


def _prepare(model: nn.Module, use_gradient_checkpointing: bool | str) -> None:
    """Freezes the base and turns checkpointing on; "unsloth" means plain checkpointing here."""
    from peft import prepare_model_for_kbit_training

    model.requires_grad_(False)
    if getattr(model, "is_loaded_in_4bit", False):
        prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=bool(use_gradient_checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def _device() -> int:
    """The GPU of this process. A script may load the model before the trainer's arguments tell torch which it is."""
    return local_rank() if world_size() > 1 else torch.cuda.current_device()


def _default_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
