# %% [markdown]
# # GRPO with a rule as the reward
#
# TRL's GRPO computes its loss itself. What runs sparse: with `SPARSITY=dense`, the default here, nothing, and training
# is exact. With `SPARSITY=rows` the forward is exact and the backward pass goes through chosen rows. Which tokens bear
# loss the gradient tells, or, from TRL 1.15 on, labels. Generating the answers, which takes most of the time, is never
# sparse. On a small model GRPO by rows gained nothing in 40 steps; dense training did, a little.
#
# `TINY=1 python examples/grpo.py` trains a random model for two steps, on a CPU too; `BACKEND=unsloth` takes Unsloth.

# %%
import os
import re

if os.environ.get("BACKEND") == "unsloth":
    import unsloth  # noqa: F401  first, as it asks: it replaces TRL's trainers
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from sparse_unsloth import FastSparseLanguageModel

TINY = os.environ.get("TINY") == "1"
if TINY:
    import tiny

# %%
name = tiny.model() if TINY else "Qwen/Qwen2.5-1.5B-Instruct"
backend, sparsity = os.environ.get("BACKEND", "peft"), os.environ.get("SPARSITY", "dense")
model, tokenizer = FastSparseLanguageModel.from_pretrained(name, max_seq_length=1024, backend=backend)
model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16, sparsity=sparsity)

# %%
if TINY:
    dataset = tiny.data(question="What is one and one?", answer="One and one is two.\n#### 2")
else:
    dataset = load_dataset("openai/gsm8k", "main", split="train")
dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})


def is_right(completions, answer, **others):
    """1 where the last number of a completion is that of the answer, behind its ####."""
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", turns[-1]["content"].replace(",", "")) for turns in completions]
    wanted = [text.rpartition("####")[2].strip().replace(",", "") for text in answer]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, wanted, strict=True)]


def has_a_number(completions, **others):
    """A tenth for any number, so that there is something to learn from at first."""
    return [0.1 * bool(re.search(r"\d", turns[-1]["content"])) for turns in completions]


# %%
arguments = {
    "output_dir": "runs/grpo", "max_steps": 200, "per_device_train_batch_size": 8, "num_generations": 8,
    "max_completion_length": 256, "learning_rate": 1e-5, "logging_steps": 1,
} | (tiny.TRAINING | {"max_completion_length": 16} if TINY else {})  # fmt: skip
rewards, args = [is_right, has_a_number], GRPOConfig(**arguments)
trainer = GRPOTrainer(model, rewards, args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
