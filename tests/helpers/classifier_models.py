"""Tiny sequence classifiers, and batches of labelled texts."""

import torch
import transformers

from tiny_models import COMMON, FAMILIES

PAD = COMMON["pad_token_id"]


def make_classifier(family="llama", num_labels=3):
    """A PEFT sequence classifier whose LoRA branches are not zero."""
    from peft import LoraConfig, get_peft_model

    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **extra, "num_labels": num_labels})
    config._attn_implementation = "eager"
    base = getattr(transformers, f"{name}ForSequenceClassification")(config)
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.05)
    return model.train()


def make_batch(side="right", labels=(0, 2, 1), lengths=(9, 5, 7)):
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place] = torch.randint(3, 96, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}
