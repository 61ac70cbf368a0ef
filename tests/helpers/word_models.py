"""A tiny random model whose tokenizer knows whole words, so that tokens can be counted by hand."""

import json

import torch
import yaml

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<assistant> {% generation %}{{ m['content'] }} <end>{% endgeneration %} "
    "{% else %}<user> {{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""A question of p words and an answer of a words: p + 3 prompt tokens and a + 1 that bear loss."""
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"one": {"type": "number"}}}}]


def save_checkpoint(folder, family="Llama", **changes):
    """A checkpoint of two layers in ``folder``, with its tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<unk>", "<end>", "<user>", "<assistant>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocabulary), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1,
        "pad_token_id": 1, "bos_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text(count: int) -> str:
    """So many words."""
    return " ".join(WORDS[index % 10] for index in range(count))


def save_rows(path, rows):
    """JSON lines; returns their path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(sizes):
    """Rows of (words of the question, words of the answer)."""
    return [{"question": text(prompt), "answer": text(answer)} for prompt, answer in sizes]


def save_recipe(path, recipe, **changes):
    """The recipe, with the changes, as a file; returns its path."""
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return str(path)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def share_gpt(*turns, **others):
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **others}
