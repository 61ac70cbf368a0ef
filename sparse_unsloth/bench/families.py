"""Defines small random models of each family that `sparse_unsloth.bench.trial` tries, and writes their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of transformers' classes.
        peft: the configuration with the PEFT backend, besides `SIZES`: all that the family can do acts on the trial's
            documents. On Unsloth's compiled path it is the same.
        unsloth: the configuration on Unsloth's fast path; None where that lacks the family.
        config: the name of the configuration's class, where it is not ``name``.
        attention: transformers' implementation of attention with the PEFT backend; "" is the default ("sdpa").
    """

    name: str
    peft: Mapping[str, Any] = field(default_factory=dict)
    unsloth: Mapping[str, Any] | None = None
    config: str = ""
    attention: str = ""


WINDOW = 48
"""Tokens of a sliding window: fewer than those of most of the trial's documents."""
NORM_SPREAD = 0.15
"""Standard deviation of what is added to norm weights: initial ones are all equal, which would hide faults."""
SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
SHARP = {"initializer_range": 0.03}
"""Of the PEFT backend's models: weights large enough for attention to tell tokens apart."""
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
}  # fmt: skip
GEMMA_2 = {
    "head_dim": 64, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 0.25,
    "final_logit_softcapping": 0.5,
}  # fmt: skip
FAMILIES = {
    "llama": Family("Llama", {}, {}),
    "mistral": Family("Mistral", {"sliding_window": WINDOW}, {"sliding_window": WINDOW}),
    "ministral3": Family("Ministral3", {"head_dim": 64, "sliding_window": WINDOW, "rope_parameters": YARN}),
    "qwen2": Family("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}, {}),
    "qwen3": Family("Qwen3", {"head_dim": 128}, {"head_dim": 64}),
    "gemma": Family("Gemma", {"head_dim": 128}, {"head_dim": 64}),
    "gemma2": Family("Gemma2", GEMMA_2, GEMMA_2),
    "gemma2-eager": Family("Gemma2", GEMMA_2, attention="eager"),
    "gemma3": Family(
        "Gemma3",
        {
            "head_dim": 64, "sliding_window": WINDOW, "query_pre_attn_scalar": 256,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        config="Gemma3Text",
    ),
    "granite": Family(
        "Granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.5, "logits_scaling": 0.5},
    ),
    "smollm3": Family(
        "SmolLM3", {"no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "olmo2": Family("Olmo2"),
}  # fmt: skip
"""All families. The attention "sdpa" of transformers ignores Gemma 2's soft cap of attention scores, "eager" has it."""
COMPILED = ("granite", "smollm3", "gemma3")
"""Families that are tried on Unsloth's compiled path too."""


def families_of(backend: str) -> tuple[str, ...]:
    """Returns the names of the families that ``backend`` is tried with, but for `COMPILED` ones."""
    return tuple(name for name, family in FAMILIES.items() if backend == "peft" or family.unsloth is not None)


def write_models(
    folder: Path, families: Iterable[str], backend: str = "unsloth", device: torch.device | str = "cpu", **changes: Any
) -> None:
    """Writes a checkpoint of random weights for each family, with a tokenizer of words, so that nothing is downloaded.

    Args:
        folder: gets ``folder / family``.
        backend: whose configuration of the family is written; ``peft`` comes with random norm weights.
        device: where the weights are drawn.
        **changes: of the configuration.
    """
    import transformers

    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False}
    for name in families:
        family = FAMILIES[name]
        rich = backend == "peft" or family.unsloth is None
        own = {**SHARP, **family.peft} if rich else family.unsloth
        config_class = getattr(transformers, f"{family.config or family.name}Config")
        config = config_class(**{**SIZES, **tokens, **own, **changes})
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = getattr(transformers, f"{family.name}ForCausalLM")(config)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                elif rich and parameter.ndim == 1:
                    parameter.add_(NORM_SPREAD * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


def make_tokenizer(names: Mapping[str, int] | None = None) -> Any:
    """Makes a tokenizer of words, one an id; ``names`` are further special tokens and their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, SIZES["vocab_size"])}}
    words = {word: i for word, i in words.items() if i not in (names or {}).values()} | (names or {})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(names or ()),
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast
