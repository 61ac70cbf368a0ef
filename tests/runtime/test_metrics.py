"""What training logs say of sparsity: it is enabled only in steps where some layer was sparse."""

import pytest
import torch
import transformers

from sparse_unsloth import attach
from sparse_unsloth.attachment import get_state

from tiny_models import always, make_batch, make_lora

ROWS = {"backward_rows": 0.5}


class Samples(torch.utils.data.Dataset):
    def __init__(self, prompts, tokens=12):
        self.ids = torch.randint(3, 96, (len(prompts), tokens), generator=torch.Generator().manual_seed(0))
        self.labels = torch.where(torch.arange(tokens) < torch.tensor(prompts)[:, None], -100, self.ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def train(tmp_path, sparsity, prompts, trainer=transformers.Trainer):
    model = make_lora()
    attach(model, sparsity)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=1, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    made = trainer(model=model, args=arguments, train_dataset=Samples(prompts))
    made._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(made.train_dataset)
    made.train()
    return [entry["sparsity/enabled"] for entry in made.state.log_history if "loss" in entry], made.state.log_history


class OwnLoss(transformers.Trainer):
    """A loss as in preference trainers: the model receives no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(input_ids=inputs["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("sparsity", [ROWS, always()], ids=["rows", "channels"])
def test_enabled_is_what_was_sparse(sparsity, tmp_path, caplog):
    enabled, log = train(tmp_path, sparsity, prompts=[8, 0, 0, 0, 0, 8])
    assert enabled == [1, 0, 1]
    shares = [entry.get("sparsity/backward_rows", entry.get("sparsity/mean_mlp")) for entry in log if "loss" in entry]
    assert [share > 0 for share in shares] == [True, False, True]
    assert "every token bears loss" not in caplog.text


@pytest.mark.parametrize("sparsity", [ROWS, always()], ids=["rows", "channels"])
def test_a_loss_on_every_token_is_said_once_and_not_enabled(sparsity, tmp_path, caplog):
    enabled, log = train(tmp_path, sparsity, prompts=[0] * 6)
    assert enabled == [0, 0, 0]
    shares = [entry.get("sparsity/backward_rows", entry.get("sparsity/mean_mlp")) for entry in log if "loss" in entry]
    assert not any(shares)
    assert sum("every token bears loss" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("sparsity", [ROWS, always()], ids=["rows", "channels"])
def test_a_loss_without_labels_is_enabled_for_rows_alone(sparsity, tmp_path, caplog):
    enabled, log = train(tmp_path, sparsity, prompts=[8] * 6, trainer=OwnLoss)
    assert enabled == [sparsity is ROWS] * 3
    shares = [entry["sparsity/context_share"] for entry in log if "loss" in entry]
    assert shares == [pytest.approx(8 / 12 if sparsity is ROWS else 0)] * 3
    assert sum("came without labels" in record.message for record in caplog.records) == 1


def test_a_plain_loop_says_that_every_token_bears_loss(caplog):
    model, batch = make_lora(), make_batch()
    batch["labels"] = batch["input_ids"]
    attach(model, ROWS)
    for _ in range(3):
        model(**batch).loss.backward()
    assert sum("every token bears loss" in record.message for record in caplog.records) == 1


def test_one_batch_without_context_is_nothing_to_say(caplog):
    model, batch = make_lora(), make_batch()
    attach(model, ROWS)
    model(**batch).loss.backward()
    for _ in range(3):
        model(**{**batch, "labels": batch["input_ids"]}).loss.backward()
    assert get_state(model).context_seen
    assert "every token bears loss" not in caplog.text
