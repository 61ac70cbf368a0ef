"""Loads what is evaluated, a run's adapter over its base model or any model, by plain transformers and PEFT.

The forward is dense and uses no code of this package, because an adapter of a sparse training is a standard adapter.
Only where its sparsity configuration sets ``sparse_prefill`` are prompts of generations sparse, as in training. TRL and
Unsloth are not imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth.data.smollm2 import resolve_model
from sparse_unsloth.data.templates import CHAT_TEMPLATE
from sparse_unsloth.errors import DataError, SparsityError
from sparse_unsloth.training.recipe import raw_values
from sparse_unsloth.utils.saved_adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    base_of,
    find_adapter,
    has_tokenizer,
    is_lost,
    load_whole,
    vocabulary_of,
)
from sparse_unsloth.utils.unreadable import first_line

RECIPE_FILE = "recipe.yaml"


class EvaluationError(SparsityError):
    """A model, data or a library that an evaluation needs is missing or does not fit."""


@dataclass(frozen=True)
class Source:
    """What to evaluate, before anything is loaded.

    Args:
        name: of the run or the model in results.
        model: hub name or folder of the base model.
        adapter: the adapter's folder; None for the base model itself.
        recipe: what the run was trained with; empty for a bare model.
        folder: of the results, inside the run if there is one.
    """

    name: str
    model: str
    adapter: Path | None
    recipe: dict[str, Any]
    folder: Path

    @property
    def template(self) -> str:
        return self.recipe.get("dataset_template", CHAT_TEMPLATE)

    @property
    def system_prompt(self) -> str | None:
        return self.recipe.get("dataset_system_prompt")


def find_source(text: str, base: bool = False, output_dir: str | None = None) -> Source:
    """Finds the source that ``text`` names: a run folder, an adapter folder, a model folder or a hub name.

    Args:
        text: as given on the command line.
        base: take the base model of the run, without its adapter.
        output_dir: of the results; by default ``evaluation`` in the run folder, else ``runs/evaluation/<name>``.

    Raises:
        EvaluationError: a run folder has no adapter.
        DataError: an adapter is damaged, or its base model was moved.
    """
    folder = Path(text)
    if (folder / RECIPE_FILE).is_file():
        recipe = raw_values(folder / RECIPE_FILE)
        adapter = folder / ADAPTER_FOLDER
        if not (adapter / ADAPTER_CONFIG).is_file() and not base:
            raise EvaluationError(f"{text}: the run has no adapter yet ({adapter}); train it to the end first.")
        name = folder.resolve().name
        results = Path(output_dir) if output_dir else folder / ("evaluation-base" if base else "evaluation")
        name = f"{name} (base)" if base else name
        model = recipe["model_name_or_path"]
        # The run may have started from another run's adapter, or its base may have been moved since.
        if (is_lost(model) or find_adapter(model) is not None) and (adapter / ADAPTER_CONFIG).is_file():
            model = base_of(adapter)
        return Source(name, model, None if base else adapter, recipe, results)
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    results = Path(output_dir or Path("runs") / "evaluation" / name)
    if (folder / ADAPTER_CONFIG).is_file():
        return Source(name, base_of(folder), None if base else folder, {}, results)
    return Source(name, text, None, {}, results)


def load(source: Source, auto_model: Any = None, sparse_prefill: bool = True, **options: Any) -> tuple[nn.Module, Any]:
    """Loads the model, in evaluation mode and on the GPU if there is one, and its tokenizer, padding on the left.

    The dtype is bfloat16 on a GPU that has it, and float32 on the CPU. An adapter is merged into the weights, which
    makes generation faster. It stays an adapter over a 4-bit base, because merging would round it off, and where
    prompts are sparse.

    Args:
        source: see `find_source`.
        auto_model: the class that loads it, ``AutoModelForCausalLM`` by default.
        sparse_prefill: False makes everything dense, whatever the adapter's sparsity configuration says.
        options: further arguments of ``from_pretrained``.

    Raises:
        EvaluationError: model, adapter, tokenizer, or the estimator that sparse prompts need, cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
    dtype = half if device == "cuda" else torch.float32
    four_bit = bool(source.recipe.get("load_in_4bit"))
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    hub = {"revision": source.recipe.get("model_revision", "main")}
    hub["trust_remote_code"] = bool(source.recipe.get("trust_remote_code", False))
    name = resolve_model(source.model)
    try:
        model = (auto_model or AutoModelForCausalLM).from_pretrained(
            name, dtype=dtype, device_map={"": device}, **hub, **options
        )
        if source.adapter is not None:
            from peft import PeftModel

            vocabulary = vocabulary_of(source.adapter)
            if vocabulary is not None and vocabulary != model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(vocabulary, mean_resizing=False)
            base = model
            model = load_whole(source.adapter, lambda: PeftModel.from_pretrained(base, str(source.adapter)))
            sparse = sparse_prefill and _make_prompts_sparse(model, source.adapter)
            if not (four_bit or sparse):
                _untie(model.get_base_model())
                model = model.merge_and_unload()
        holds_tokenizer = source.adapter is not None and has_tokenizer(source.adapter)
        tokenizer = AutoTokenizer.from_pretrained(str(source.adapter) if holds_tokenizer else name, **hub)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise EvaluationError(
            f"{source.name}: the model cannot be loaded: {source.model!r}: {reason}. Give a "
            "folder with a transformers checkpoint, a run's folder, or a hub name that can be reached from here."
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if source.template == CHAT_TEMPLATE and source.recipe and tokenizer.chat_template is None:
        raise EvaluationError(
            f"{source.name}: its tokenizer has no chat template. The recipe's dataset_template must be the one that "
            "the model was trained with."
        )
    return model.eval(), tokenizer


def _untie(model: nn.Module) -> None:
    """Unties head and embedding where an adapter is on one of them: merging would change both."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (getattr(part, "base_layer", part) for part in both)
    if head is None or both == (embedding, head) or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # what save_pretrained goes by


def _make_prompts_sparse(model: nn.Module, adapter: Path) -> bool:
    """Turns sparse prefill on if the adapter's sparsity configuration asks for it; returns whether it does."""
    from sparse_unsloth.attachment import CONFIG_NAME, attach, get_state
    from sparse_unsloth.config.sparsity import SparsityConfig
    from sparse_unsloth.runtime.prefill import switch

    file = adapter / CONFIG_NAME
    config = SparsityConfig.from_file(file) if file.is_file() else SparsityConfig()
    if not config.sparse_prefill:
        return False
    attach(model, config)
    state = get_state(model)
    state.adapter_folder = adapter
    switch(state, on=True)
    return True
