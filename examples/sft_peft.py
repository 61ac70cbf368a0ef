# %% [markdown]
# # Supervised fine-tuning without Unsloth
#
# The PEFT backend runs wherever PyTorch does, for any decoder of transformers, with Unsloth's signatures. A model that
# has LoRA already is attached by `attach(model, "auto")` instead; the trainer stays yours.
#
# `TINY=1 python examples/sft_peft.py` runs the same code on a CPU in seconds, with a random model.

# %%
import os

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from sparse_unsloth import FastSparseLanguageModel

TINY = os.environ.get("TINY") == "1"
if TINY:
    import tiny

# %%
model, tokenizer = FastSparseLanguageModel.from_pretrained(
    tiny.model() if TINY else "Qwen/Qwen2.5-1.5B-Instruct", max_seq_length=1024, backend="peft"
)
model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16)

# %%
if TINY:
    dataset = tiny.data(question="What is one and one?", answer="One and one is two.\n#### 2")
else:
    dataset = load_dataset("openai/gsm8k", "main", split="train")


def as_conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


dataset = dataset.map(as_conversation, remove_columns=dataset.column_names)

# %%
arguments = {
    "output_dir": "runs/sft-peft", "max_length": 1024, "num_train_epochs": 1, "per_device_train_batch_size": 8,
    "learning_rate": 2e-4, "logging_steps": 10,
} | (tiny.TRAINING if TINY else {})  # fmt: skip
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=SFTConfig(**arguments))
trainer.train()

# %%
model.save_pretrained("runs/sft-peft/adapter")
model, tokenizer = FastSparseLanguageModel.from_pretrained("runs/sft-peft/adapter", max_seq_length=1024, backend="peft")
