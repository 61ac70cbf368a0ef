# %% [markdown]
# # A vision-language model
#
# Formulas in pictures, to be read as LaTeX. The tokens of the picture are context tokens, and row sparsity takes part
# of them through the backward pass of the text decoder. The vision tower gets no LoRA and stays as it is. This runs
# on the PEFT backend; with Unsloth only a random Qwen3-VL was tried. Needs `pip install pillow torchvision` too.
#
# `TINY=1 python examples/vision_language.py` runs the same code in seconds, with a random model, on a CPU too.

# %%
import os

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from sparse_unsloth import FastSparseLanguageModel

TINY = os.environ.get("TINY") == "1"
if TINY:
    import tiny

# %%
model, processor = FastSparseLanguageModel.from_pretrained(
    tiny.vision_model() if TINY else "Qwen/Qwen3-VL-2B-Instruct",
    max_seq_length=2048,
    load_in_4bit=False,
    backend="peft",
)
model = FastSparseLanguageModel.get_peft_model(model, r=16, lora_alpha=16, sparsity="rows")

# %%
if TINY:
    dataset = tiny.data(image=tiny.picture(), text="x + 1")
else:
    dataset = load_dataset("unsloth/LaTeX_OCR", split="train")


def as_conversation(row):
    return {
        "prompt": [{"role": "user", "content": "Write the formula of this picture in LaTeX."}],
        "completion": [{"role": "assistant", "content": row["text"]}],
    }


dataset = dataset.map(as_conversation, remove_columns=["text"])  # TRL puts the picture in front of the question

# %%
arguments = {
    "output_dir": "runs/vision-language", "max_length": None, "max_steps": 200, "per_device_train_batch_size": 4,
    "learning_rate": 2e-4, "logging_steps": 10,
} | (tiny.TRAINING if TINY else {})  # fmt: skip
trainer = SFTTrainer(model=model, processing_class=processor, train_dataset=dataset, args=SFTConfig(**arguments))
trainer.train()

# %%
model.save_pretrained("runs/vision-language/adapter")
