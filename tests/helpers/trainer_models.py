"""Real trainers of tiny models whose micro-batches are merged, and what a training of them is compared by."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sparse_unsloth import attach

from tiny_models import loras, make_base, make_batch, make_lora
from word_models import save_checkpoint as save_words

LENGTHS = [(5, 3), (2, 6), (7, 2), (4, 4), (9, 1), (3, 3), (6, 5), (1, 2), (8, 3), (2, 2), (5, 5), (3, 7), (4, 1)]
"""Of prompts and answers: 13 samples, so that an epoch ends with an incomplete step."""
SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "logging_steps": 1,
    "learning_rate": 0.5,
    "optim": "sgd",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "include_num_input_tokens_seen": "all",
    "gradient_checkpointing": False,
}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}
TIMES, MERGED = ("runtime", "per_second"), "sparsity/merged_micro_batches"
FLAT = DataCollatorWithFlattening(return_flash_attn_kwargs=False)


class Tokenizer:
    """What a padding collator needs of one."""

    padding_side = "right"

    def pad(self, features, **ignored):
        longest = max(len(one["input_ids"]) for one in features)
        padded = [one["input_ids"] + [2] * (longest - len(one["input_ids"])) for one in features]
        masks = [[1] * len(one["input_ids"]) + [0] * (longest - len(one["input_ids"])) for one in features]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


class Watch(TrainerCallback):
    """Counts forwards, and the calls of the loop."""

    def __init__(self):
        self.calls, self.sizes = Counter(), []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, model, args, kwargs):
        if model.training and torch.is_grad_enabled():
            self.sizes.append(tuple(kwargs["input_ids"].shape))

    def on_substep_end(self, *args, **kwargs):
        self.calls["substep"] += 1

    def on_step_end(self, *args, **kwargs):
        self.calls["step"] += 1


def rows(lengths=LENGTHS):
    samples = [make_batch(number, lengths=(pair,)) for number, pair in enumerate(lengths)]
    return [{name: sample[name][0].tolist() for name in ("input_ids", "labels")} for sample in samples]


def model_of(sparsity, seed=0, dtype=torch.float64, **changes):
    model = make_lora(base=make_base("llama", seed, dtype, num_hidden_layers=2, **changes))
    attach(model, sparsity)
    return model


def transformers_trainer(model, folder, lengths=LENGTHS, collator=FLAT, cls=Trainer, **changes):
    args = TrainingArguments(output_dir=str(folder), **SETTINGS | {"remove_unused_columns": False} | changes)
    data = rows(lengths)
    return cls(model=model, args=args, train_dataset=data, eval_dataset=data[:3], data_collator=collator)


def words_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_words(folder))


def trl_trainer(model, folder, tokenizer, lengths=LENGTHS, **changes):
    args = SFTConfig(output_dir=str(folder), **SETTINGS | {"max_length": None, "padding_free": True} | ADAM | changes)
    data = Dataset.from_list(rows(lengths))
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def run(trainer, resume=None):
    """The trained weights, the log and what `Watch` saw."""
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    assert not {"training_step", "get_batch_samples"} & vars(trainer).keys()
    return {name: one.detach().clone() for name, one in loras(trainer.model).items()}, trainer.state.log_history, watch


def assert_same(ours, theirs, means=(), tolerance=1e-7):
    """Weights and logs; ``means``: figures that are means over other things."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=tolerance)
    assert len(ours[1]) == len(theirs[1])
    for line, expected in zip(ours[1], theirs[1], strict=True):
        names = [name for name in expected if not any(word in name for word in TIMES)]
        assert line.keys() - expected.keys() <= {MERGED}
        assert {name: line[name] for name in names if name not in means} == {
            name: pytest.approx(expected[name], rel=1e-5, abs=1e-12) for name in names if name not in means
        }
    assert ours[2].calls == theirs[2].calls


def merged(trainer):
    return [line[MERGED] for line in trainer.state.log_history if MERGED in line]


def said(caplog):
    return [one.getMessage() for one in caplog.records if "merge_micro_batches" in one.getMessage()]


DENSE, EIGHT = {"preset": "dense"}, {"preset": "dense", "merge_micro_batches": 8}
SUMS = ("train_loss", "total_flos")
"""Figures of the whole training, which a resumed one has only a part of."""
PADDED = DataCollatorForSeq2Seq(Tokenizer(), padding=True)


class Leaky(nn.Module):
    """Documents see the mean of what came before them in the row, as in a recurrent layer without boundaries."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.weight = embedding, embedding.weight

    def forward(self, ids):
        rows = self.embedding(ids)
        return rows + 0.1 * rows.cumsum(1)


def leak(model):
    model.get_base_model().model.embed_tokens = Leaky(model.get_base_model().model.embed_tokens)
