# %% [markdown]
# # Passages and long prompts
#
# Ten passages and a question in front of an answer of a few words: nearly all tokens are context, which is where row
# sparsity saves most. The forward pass stays exact; the backward pass of each layer goes through the loss tokens and
# the tenth of the context tokens whose gradient is largest.
#
# `TINY=1 python examples/passages.py` runs the same code on a CPU in seconds, with a random model.

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
    tiny.model() if TINY else "Qwen/Qwen2.5-1.5B-Instruct", max_seq_length=4096, backend="peft"
)
model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16, sparsity={"backward_rows": 0.1})

# %%
if TINY:
    passages = {"title": ["A", "B"], "sentences": [["A is red."], ["B is blue."]]}
    dataset = tiny.data(question="What is B?", answer="blue", context=passages)
else:
    dataset = load_dataset("hotpotqa/hotpot_qa", "distractor", split="train[:8000]")


def as_conversation(row):
    titles, sentences = row["context"]["title"], row["context"]["sentences"]
    passages = [f"{title}: {''.join(parts)}" for title, parts in zip(titles, sentences, strict=True)]
    question = "\n\n".join([*passages, row["question"], "Answer in a few words."])
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def fits(row):  # what is cut off at max_length would be the answer
    return len(tokenizer(row["prompt"][0]["content"])["input_ids"]) < 4000


dataset = dataset.map(as_conversation, remove_columns=dataset.column_names).filter(fits)

# %%
arguments = {
    "output_dir": "runs/passages", "max_length": 4096, "max_steps": 500, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "logging_steps": 10,
} | (tiny.TRAINING if TINY else {})  # fmt: skip
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=SFTConfig(**arguments))
trainer.train()  # the logs show sparsity/context_share
