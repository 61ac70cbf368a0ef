"""Provides `FastSparseLanguageModel`: Unsloth's ``FastLanguageModel`` with sparse paths, on Unsloth or plain PEFT."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth.attachment import attach, get_state, why_unplanned
from sparse_unsloth.backends.choose import BackendName, choose_backend, load_backend
from sparse_unsloth.backends.peft import loading as peft_loading
from sparse_unsloth.config.removed import AUTO_WAS_CALIBRATED
from sparse_unsloth.config.sparsity import CONFIG_NAME, SparsityConfig
from sparse_unsloth.errors import BackendError, CalibrationError, ConfigError, SparsityError
from sparse_unsloth.runtime import prefill
from sparse_unsloth.utils.arguments import check_folder, check_length, check_lora, check_names, why_not_found
from sparse_unsloth.utils.distributed import from_main, has_group, is_main, world_size
from sparse_unsloth.utils.saved_adapters import check_targets, find_adapter, load_whole

logger = logging.getLogger("sparse_unsloth")

Sparsity = SparsityConfig | Mapping[str, Any] | str | Path | None

HUB = ("token", "revision", "trust_remote_code", "subfolder", "cache_dir", "local_files_only")
"""Arguments that tell where a model's configuration is."""
CONFIG_ELSEWHERE = {"config", "gguf_file"}
"""Arguments that bring the configuration themselves."""
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastSparseLanguageModel:
    """Loads models and adds LoRA like ``unsloth.FastLanguageModel``, with the same arguments and defaults.

    Added arguments: ``backend`` and ``sparsity`` of `from_pretrained`, ``sparsity`` and ``calibration_samples`` of
    `get_peft_model`, ``sparse_prefill`` of `for_inference`.
    """

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = True,
        *,
        backend: BackendName = "auto",
        sparsity: Sparsity = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """Loads a model and its tokenizer from the hub or a folder; for a folder with a LoRA adapter, its base too.

        The folder of a checkpoint, or of a finished run of `sparse-unsloth train`, means the adapter in it. The token
        embeddings saved with the adapter are loaded, and its tokenizer, else that of its base.

        An adapter saved from a sparse run is attached with the sparsity configuration saved beside it.

        Args:
            model_name: hub name or folder.
            max_seq_length: longest training sequence, in tokens; None: as long as the model's positions.
            dtype: of weights and activations; None takes bfloat16 on GPUs that have it, float16 on others, float32 on
                the CPU.
            load_in_4bit: quantise the base weights to NF4 (QLoRA); False keeps ``dtype``.
            backend: "unsloth" needs a CUDA GPU and Unsloth; "peft" runs anywhere; "auto" chooses Unsloth where it can
                run, and prints its choice.
            sparsity: for an adapter folder, replaces the saved configuration ("dense" continues without sparsity).
            **kwargs: as Unsloth's ``from_pretrained`` takes them (``token``, ``revision``, ``device_map``,
                ``trust_remote_code``, ``gguf_file``, ...).

        Returns:
            ``(model, tokenizer)``.

        Raises:
            BackendError: the backend cannot run here, or does not support an argument.
            ConfigError: a misspelt argument, or a ``max_seq_length`` below 1.
            DataError: an adapter that is damaged, does not fit its base model, or whose base cannot be loaded; a model
                that is not found, or whose configuration cannot be read.
        """
        check_length(max_seq_length)
        chosen = choose_backend(backend)
        names = *peft_loading.NEEDS_UNSLOTH, *peft_loading.IGNORED
        check_names(kwargs, (FastSparseLanguageModel.from_pretrained, peft_loading.load), names)
        adapter = find_adapter(model_name)
        name = os.path.expanduser(model_name) if adapter is None else str(adapter)
        named = adapter is None and CONFIG_ELSEWHERE.isdisjoint(kwargs)
        if named:
            check_folder(name, kwargs.get("subfolder", ""))
        try:
            model, tokenizer = load_whole(
                adapter, lambda: chosen.load(name, max_seq_length, dtype, load_in_4bit, **kwargs)
            )
        except SparsityError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError):
            hub = {key: kwargs[key] for key in HUB if key in kwargs}
            if not named or (found := why_not_found(name, hub)) is None:
                raise
            raise found from None  # the library's tracebacks are 50 lines, and its reason is in the message
        model.__dict__["_sparse_backend"] = chosen.NAME
        saved = Path(name) / CONFIG_NAME
        if hasattr(model, "peft_config") and (sparsity is not None or saved.is_file()):
            _print(attach(model, saved if sparsity is None else sparsity))
            state = get_state(model)
            assert state is not None
            state.adapter_folder = Path(name)
        elif sparsity is not None:
            raise BackendError(
                "sparsity= of from_pretrained is for adapter folders; give it to get_peft_model instead."
            )
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        r: int = 16,
        target_modules: list[str] | tuple[str, ...] | str = TARGET_MODULES,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        *,
        sparsity: Sparsity = "auto",
        calibration_samples: list[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Adds LoRA adapters, attaches the sparse paths, and prints the report of each layer.

        Args:
            model: from `from_pretrained`.
            r, target_modules, lora_alpha, lora_dropout, bias: as in Unsloth and PEFT. Sparse layers need
                ``lora_dropout=0`` and ``bias="none"``.
            sparsity: a `SparsityConfig`, the path of one (YAML, JSON), a mapping, a preset ("auto", the default:
                decided and printed when training begins, by the data, the GPU and its memory; a model whose layers it
                cannot predict trains as it is, and a line says why; "rows": an exact forward, and a backward pass
                through a quarter of the context tokens; "o1", "o2", "dense"), or
                "calibrated": `calibrate` chooses each layer's sparsity on ``calibration_samples``, at its default
                budget.
            calibration_samples: batches as the model receives them, for calibrated estimators. Without them the
                trainer's first samples are used when training begins.
            **kwargs: as Unsloth's ``get_peft_model`` takes them (``use_gradient_checkpointing="unsloth"``,
                ``random_state=3407``, ``use_rslora``, ``layers_to_transform``, ``modules_to_save``, ...).

        Raises:
            AttachError, ConfigError, EstimatorError: see `attach`.
            BackendError: the backend does not support an argument.
            CalibrationError: see `calibrate`; or "calibrated" without samples.
            ConfigError: also for target modules, or ``modules_to_save``, that the model does not have, a misspelt
                argument, and sizes that cannot train (``lora_alpha=0``).
        """
        check_lora(r, lora_alpha, lora_dropout)
        calibrated = isinstance(sparsity, str) and sparsity == "calibrated"
        if calibrated and not calibration_samples:
            raise CalibrationError(
                "sparsity='calibrated' needs calibration_samples: a few batches of your data as the model receives "
                "them, from the trainer's collator; or run `sparse-unsloth calibrate` and give its sparsity.yaml."
            )
        config = SparsityConfig.from_any(None if calibrated else sparsity)
        if config.is_auto and calibration_samples:
            raise ConfigError(AUTO_WAS_CALIBRATED)
        check_targets(model, target_modules, "target_modules")
        check_targets(model, kwargs.get("modules_to_save"), "modules_to_save")
        from peft import LoraConfig

        takers = FastSparseLanguageModel.get_peft_model, peft_loading.add_lora, LoraConfig
        check_names(kwargs, takers, peft_loading.OF_UNSLOTHS_LORA)
        backend = load_backend(model.__dict__.get("_sparse_backend", "peft"))
        model = backend.add_lora(
            model,
            r=r,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            **kwargs,
        )
        model.__dict__["_sparse_backend"] = backend.NAME
        if calibrated:
            from sparse_unsloth.autosparsity.report import summary
            from sparse_unsloth.autosparsity.search import calibrate

            def choose() -> tuple[SparsityConfig, list[str]]:
                result = calibrate(model, calibration_samples or [], lora_rank=r)
                return result.config, summary(result)

            if world_size() > 1 and not has_group():
                from accelerate import PartialState

                PartialState()
            config, lines = from_main(choose)
            _print(*lines)
        if config.model_fields_set == {"preset"} and config.is_auto and (why := why_unplanned(model)):
            _print(f"sparse_unsloth auto: nothing is attached, the model trains as it is, exactly. {why}")
        else:
            _print(attach(model, config, calibration_samples))
        return model

    @staticmethod
    def for_training(model: nn.Module, use_gradient_checkpointing: bool | str | None = None) -> nn.Module:
        """Switches to training and returns the model. None keeps the model's checkpointing mode."""
        state = get_state(model)
        if state is not None:
            prefill.switch(state, on=False)
        return load_backend(_backend_name(model)).for_training(model, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: nn.Module, sparse_prefill: bool | None = None) -> nn.Module:
        """Switches to generation and returns the model.

        Args:
            sparse_prefill: whether prompts are computed as in training, on channels selected for the batch
                (`runtime.prefill`). The last token of each prompt and decoded tokens are dense; without a cache
                (``use_cache=False``) all tokens are. None: the configuration's ``sparse_prefill``, off by default.

        Raises:
            SparsityError: ``sparse_prefill`` for a model that is not attached or has no sparse layer.
            EstimatorError: ``sparse_prefill`` without an estimator, and without one beside the adapter that fits.
        """
        state = get_state(model)
        if state is None and sparse_prefill:
            raise SparsityError("sparse_prefill: the model is not attached; attach(model, sparsity) comes first.")
        if state is not None:
            configured = state.config.sparse_prefill and bool(state.runtimes)
            prefill.switch(state, configured if sparse_prefill is None else sparse_prefill)
        return load_backend(_backend_name(model)).for_inference(model)


def _print(*lines: Any) -> None:
    """Prints on the main process."""
    if is_main():
        print(*lines, sep="\n")


def _backend_name(model: nn.Module) -> str:
    """The library that loaded ``model``, and switches its modes: Unsloth binds its functions to each model."""
    return model.__dict__.get("_sparse_backend") or ("unsloth" if "for_training" in model.__dict__ else "peft")
