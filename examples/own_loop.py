# %% [markdown]
# # Your own loop
#
# Without a trainer two calls drive the sparse paths: `begin_training` before the loop and `set_step` before each step.
# The labels tell loss tokens from context tokens. Any PEFT model is attached by `attach`.
#
# `TINY=1 python examples/own_loop.py` runs the same code in seconds, with a random model, on a CPU too.

# %%
import os

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from sparse_unsloth import attach, get_state

TINY = os.environ.get("TINY") == "1"
if TINY:
    import tiny

# %%
name, steps = (tiny.model(), 2) if TINY else ("HuggingFaceTB/SmolLM2-360M-Instruct", 200)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
model = get_peft_model(model.to(device), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
print(attach(model, "rows"))

# %%
if TINY:
    dataset = tiny.data(question="What is one and one?", answer="One and one is two.\n#### 2")
else:
    dataset = load_dataset("openai/gsm8k", "main", split="train")


def tokens(row):
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


dataset = dataset.map(tokens, remove_columns=dataset.column_names)
batches = torch.utils.data.DataLoader(dataset, 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

# %%
state = get_state(model)
state.begin_training("my loop", max_steps=steps)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
model.train()
for step, batch in zip(range(steps), batches, strict=False):
    state.set_step(step)
    loss = model(**batch.to(device)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
