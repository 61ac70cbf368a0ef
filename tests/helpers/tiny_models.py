"""Tiny random models of every supported family, and batches with prompts, answers and padding."""

import torch
import transformers
from torch.nn import functional as F

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),  # biases on q, k, v
    "qwen3": ("Qwen3", {"head_dim": 16}),  # head norms
    "gemma": ("Gemma", {"head_dim": 16}),  # tanh GELU
    "gemma2": ("Gemma2", {"head_dim": 16}),  # post-norms
    "granite": ("Granite", {}),
}


def make_base(family: str = "llama", seed: int = 0, dtype=torch.float32, **changes):
    name, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **extra, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():  # biases start at zero in transformers; trained ones are not
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def pack_nf4(base):
    """``base`` with its decoder layers' projections in NF4, in place."""
    import bitsandbytes as bnb

    for layer in base.model.layers:
        for part in (layer.mlp, layer.self_attn):
            for name, old in list(part.named_children()):
                if isinstance(old, torch.nn.Linear):
                    packed = bnb.nn.Linear4bit(
                        old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                    )
                    packed.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(part, name, packed.to("cpu"))
    return base


def make_lora(
    family: str = "llama", seed: int = 0, dtype=torch.float32, base=None, lora_b=0.05, targets=None, **changes
):
    """A PEFT model whose LoRA branches are not zero."""
    from peft import LoraConfig, get_peft_model

    base = make_base(family, seed, dtype, **changes) if base is None else base
    torch.manual_seed(seed + 1)
    targets = targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, lora_b)
    return model.train()


def make_batch(seed: int = 0, side: str = "right", vocab: int = 96, lengths=((9, 4), (5, 6), (7, 2))):
    """Three samples of (prompt, answer) tokens, padded on ``side``; the second has no prompt token in common."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(prompt + answer for prompt, answer in lengths)
    ids = torch.full((len(lengths), longest), 2)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(lengths):
        start = 0 if side == "right" else longest - prompt - answer
        tokens = torch.randint(3, vocab, (prompt + answer,), generator=generator)
        ids[row, start : start + prompt + answer] = tokens
        labels[row, start + prompt : start + prompt + answer] = tokens[prompt:]
        mask[row, start : start + prompt + answer] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def always(**changes):
    """A sparsity configuration without a schedule, on every layer."""
    return {
        "mlp": {"all": 0.6},
        "self_attn": {"all": 0.5},
        "estimator": {"kind": "svd"},
        "start_step": 0,
        "end_step": 1.0,
        **changes,
    }


def loras(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model, batch, loss_of=lambda model, batch: model(**batch).loss):
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in loras(model).items()}


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def own_loss(model, batch, weights=(1.0, -2.0, 0.0), **arguments):
    """A sum over labelled tokens, weighted by sequence as by GRPO's advantages; the model receives no labels."""
    logits = model(**without_labels(batch), **arguments).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, -logits.shape[1] :], reduction="none")
    return (losses * losses.new_tensor(weights)[:, None]).sum()


def make_tokenizer(template=None):
    """Of words, each one of the tiny models' tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, 96)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def save_checkpoint(folder) -> str:
    """A tiny Llama with a word-level tokenizer."""
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(checkpoint, **options):
    from sparse_unsloth import FastSparseLanguageModel

    options = {"load_in_4bit": False, "max_seq_length": 64, "backend": "peft", **options}
    return FastSparseLanguageModel.from_pretrained(checkpoint, **options)
