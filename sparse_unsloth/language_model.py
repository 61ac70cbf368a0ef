"""`FastSparseLanguageModel`: Unsloth's ``FastLanguageModel`` with sparse paths, on Unsloth or on plain PEFT."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth.attachment import CONFIG_NAME, attach, get_state
from sparse_unsloth.backends.choose import BackendName, choose_backend, load_backend
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import BackendError, CalibrationError, SparsityError
from sparse_unsloth.runtime import prefill
from sparse_unsloth.utils.distributed import from_main, has_group, is_main, world_size
from sparse_unsloth.utils.saved_adapters import check_targets, find_adapter, load_whole

logger = logging.getLogger("sparse_unsloth")

Sparsity = SparsityConfig | Mapping[str, Any] | str | Path | None

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastSparseLanguageModel:
    """Loads models and adds LoRA as ``unsloth.FastLanguageModel`` does, with the same arguments and defaults.

    The two additions are ``backend=`` of `from_pretrained` and ``sparsity=`` of `get_peft_model`.
    """

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = True,
        *,
        backend: BackendName = "auto",
        sparsity: Sparsity = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """Loads a model and its tokenizer, from the hub or a folder; a folder with a LoRA adapter loads its base too.

        The folder of a checkpoint, or of a run that `sparse-unsloth train` finished, means the adapter in it. It comes
        with the token embeddings and the tokenizer that were saved with it, the latter else from its base.

        An adapter that was saved from a sparse run has its sparsity configuration beside it, and is attached with it.

        Args:
            model_name: hub name or folder.
            max_seq_length: longest training sequence, in tokens.
            dtype: of weights and activations; None takes bfloat16 on GPUs that have it, float16 on others, float32 on
                the CPU.
            load_in_4bit: quantise the base weights to NF4 (QLoRA); False keeps ``dtype``.
            backend: "unsloth" needs a CUDA GPU and Unsloth; "peft" runs anywhere; "auto" takes Unsloth where both are
                there, and says what it took.
            sparsity: for an adapter folder, in place of the saved configuration ("dense" trains it on densely).
            **kwargs: as Unsloth's ``from_pretrained`` takes them (``token``, ``revision``, ``device_map``,
                ``trust_remote_code``, ``gguf_file``, ...).

        Returns:
            ``(model, tokenizer)``.

        Raises:
            BackendError: the backend cannot run here, or cannot do what an argument asks for.
            DataError: an adapter that is damaged, does not fit its base model, or whose base cannot be loaded.
        """
        chosen = choose_backend(backend)
        adapter = find_adapter(model_name)
        name = model_name if adapter is None else str(adapter)
        model, tokenizer = load_whole(adapter, lambda: chosen.load(name, max_seq_length, dtype, load_in_4bit, **kwargs))
        model.__dict__["_sparse_backend"] = chosen.NAME
        saved = Path(name) / CONFIG_NAME
        if hasattr(model, "peft_config") and (sparsity is not None or saved.is_file()):
            _say(attach(model, saved if sparsity is None else sparsity))
            get_state(model).adapter_folder = Path(name)
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
        sparsity: Sparsity = "rows",
        calibration_samples: list[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Adds LoRA adapters and attaches the sparse paths; prints what became sparse in each layer.

        Args:
            model: from `from_pretrained`.
            r, target_modules, lora_alpha, lora_dropout, bias: as in Unsloth and PEFT. Sparse layers need
                ``lora_dropout=0`` and ``bias="none"``.
            sparsity: a `SparsityConfig`, the path of one (YAML, JSON), a mapping, a preset ("rows", the default: an
                exact forward, and a backward pass through a quarter of the context rows; "o1", "o2", "dense"), or
                "auto": `calibrate` chooses each layer's on ``calibration_samples``, at its default budget.
            calibration_samples: batches as the model receives them, for estimators that calibrate; without them the
                trainer's first samples are taken when training begins.
            **kwargs: as Unsloth's ``get_peft_model`` takes them (``use_gradient_checkpointing="unsloth"``,
                ``random_state=3407``, ``use_rslora``, ``layers_to_transform``, ``modules_to_save``, ...).

        Raises:
            AttachError, ConfigError, EstimatorError: see `attach`.
            BackendError: the backend cannot do what an argument asks for.
            CalibrationError: see `calibrate`; or "auto" without samples.
            ConfigError: also for target modules, or ``modules_to_save``, that the model does not have.
        """
        auto = isinstance(sparsity, str) and sparsity == "auto"
        if auto and not calibration_samples:
            raise CalibrationError(
                "sparsity='auto' needs calibration_samples: a few batches of your data as the model receives them, "
                "from the trainer's collator; or run `sparse-unsloth calibrate` and give its sparsity.yaml."
            )
        config = SparsityConfig.from_any(None if auto else sparsity)
        check_targets(model, target_modules, "target_modules")
        check_targets(model, kwargs.get("modules_to_save"), "modules_to_save")
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
        if auto:
            from sparse_unsloth.autosparsity.report import summary
            from sparse_unsloth.autosparsity.search import calibrate

            def choose() -> tuple[SparsityConfig, list[str]]:
                result = calibrate(model, calibration_samples, lora_rank=r)
                return result.config, summary(result)

            if world_size() > 1 and not has_group():
                from accelerate import PartialState

                PartialState()
            config, lines = from_main(choose)
            _say(*lines)
        _say(attach(model, config, calibration_samples))
        return model

    @staticmethod
    def for_training(model: nn.Module, use_gradient_checkpointing: bool | str | None = None) -> nn.Module:
        """Switches to training; returns the model. None keeps the checkpointing mode that the model has."""
        state = get_state(model)
        if state is not None:
            prefill.switch(state, on=False)
        return load_backend(_backend_name(model)).for_training(model, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: nn.Module, sparse_prefill: bool | None = None) -> nn.Module:
        """Switches to generation; returns the model.

        Args:
            sparse_prefill: compute prompts as they were in training, on the channels that the estimator chooses for the
                batch (`runtime.prefill`); the last token of each prompt and what is decoded are dense. Without a cache
                (``use_cache=False``) everything is. None: as the configuration's ``sparse_prefill`` says, which
                is off by default.

        Raises:
            SparsityError: asked for, and the model is not attached or has no sparse layer.
            EstimatorError: asked for, and there is no estimator yet, nor one stored beside the adapter that fits.
        """
        state = get_state(model)
        if state is None and sparse_prefill:
            raise SparsityError("sparse_prefill: the model is not attached; attach(model, sparsity) comes first.")
        if state is not None:
            wanted = state.config.sparse_prefill and bool(state.runtimes) if sparse_prefill is None else sparse_prefill
            prefill.switch(state, wanted)
        return load_backend(_backend_name(model)).for_inference(model)


def _say(*lines: Any) -> None:
    """Prints on one of the processes that were launched together."""
    if is_main():
        print(*lines, sep="\n")


def _backend_name(model: nn.Module) -> str:
    state = get_state(model)
    return state.backend.name if state is not None else model.__dict__.get("_sparse_backend", "peft")
