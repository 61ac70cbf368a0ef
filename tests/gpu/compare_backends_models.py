"""Small random checkpoints of the families that Unsloth's fast path runs."""

import os
from pathlib import Path

import torch
import transformers

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "gemma": ("Gemma", {"head_dim": 64}),
    "gemma2": ("Gemma2", {"head_dim": 64}),
}


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer with a chat template, so that nothing has to be fetched."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def write_models(folder: Path, families=tuple(FAMILIES), **changes) -> None:
    """One checkpoint folder for each family; hidden size 256, four layers, four query heads over two key heads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for family in families:
        name, extra = FAMILIES[family]
        config = getattr(transformers, f"{name}Config")(
            **{
                "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
                "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
                **extra, **changes,
            }
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.1)
        model.save_pretrained(folder / family)
        make_tokenizer(folder / family, config.vocab_size)
