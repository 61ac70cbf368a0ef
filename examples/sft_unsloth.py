# %% [markdown]
# # Supervised fine-tuning with Unsloth
#
# Beside Unsloth's own notebooks one import is new: `FastSparseLanguageModel` instead of `FastLanguageModel`. The data
# tells prompt from answer, so the loss is on the answers alone. `sparsity="auto"`, the default, decides when training
# begins what is worth doing on this GPU, and prints it. Needs an NVIDIA GPU.
#
# `TINY=1 python examples/sft_unsloth.py` tries the same code with a random model; without a GPU on the PEFT backend.

# %%
import os

import torch

if os.environ.get("TINY") != "1" or torch.cuda.is_available():
    import unsloth  # noqa: F401  first, as it asks: it replaces TRL's trainers
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from sparse_unsloth import FastSparseLanguageModel

TINY = os.environ.get("TINY") == "1"
if TINY:
    import tiny

# %%
model, tokenizer = FastSparseLanguageModel.from_pretrained(
    tiny.model() if TINY else "unsloth/Llama-3.2-3B-Instruct", max_seq_length=2048
)
model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="unsloth")

# %%
if TINY:
    dataset = tiny.data(query="Add two numbers in Python.", answer="a + b", lang="python", resource="tiny")
else:
    dataset = load_dataset("m-a-p/CodeFeedback-Filtered-Instruction", split="train")


def as_conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["query"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


dataset = dataset.map(as_conversation, remove_columns=dataset.column_names)

# %%
arguments = {
    "output_dir": "runs/sft-unsloth", "max_length": 2048, "max_steps": 200, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "learning_rate": 2e-4, "logging_steps": 10,
} | (tiny.TRAINING if TINY else {})  # fmt: skip
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=SFTConfig(**arguments))
trainer.train()

# %%
model.save_pretrained("runs/sft-unsloth/adapter")  # a plain PEFT adapter, and the sparsity configuration beside it
