"""Preset `auto`: what it plans when training begins, in trainers and own loops, on a CPU; and how it mends its plan."""

import logging
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.utils.data import IterableDataset

from sparse_unsloth.attachment import PLAN_NAME, attach, detach, get_state
from sparse_unsloth.backends import row_hooks
from sparse_unsloth.config.sparsity import CONFIG_NAME, SparsityConfig
from sparse_unsloth.errors import AttachError, ConfigError
from sparse_unsloth.planning.progress import MEASURED, WARM_UP
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.runtime import auto
from sparse_unsloth.runtime.auto import plan_from_data

from classifier_models import make_classifier
from tiny_models import loras, loss_and_gradients, make_batch, make_lora, save_checkpoint

ANSWERS = make_batch(lengths=((6, 40), (9, 50), (7, 30)))
PROMPTS = make_batch(lengths=((90, 4), (80, 6), (85, 2)))
DENSE, ROWS = (1.0, False), (0.25, False)


def chosen(model):
    config = get_state(model).config
    return config.backward_rows, config.cuda_graphs


def tables(capsys):
    """The tables that were printed, as lists of lines."""
    found = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("sparse_unsloth auto") and "micro-batch, " in line and "context" in line:
            found.append([])
        if found and (line.startswith("  ") or line.startswith("sparse_unsloth auto")):
            found[-1].append(line)
    return found


def same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, **tolerance)


# -- A loop of the user's own -----------------------------------------------------------------------------------------


def test_nothing_is_decided_when_it_is_attached(capsys):
    model = make_lora()
    report = attach(model)
    assert str(report) == "sparse_unsloth: 3 layers attached (peft); auto decides when training begins"
    assert (get_state(model).auto.decision, get_state(model).hooked) == (None, [])
    model.eval()
    model(**ANSWERS)
    with torch.no_grad():
        model.train()(**ANSWERS)
    assert get_state(model).auto.decision is None
    detach(model)
    assert get_state(model) is None


def test_few_context_tokens_train_exactly(capsys):
    plain, ours = make_lora(), make_lora()
    attach(ours)
    for _ in range(2):
        same(loss_and_gradients(ours, ANSWERS), loss_and_gradients(plain, ANSWERS), rtol=0, atol=0)
    assert chosen(ours) == DENSE
    (lines,) = tables(capsys)
    assert len(lines) <= 8
    assert lines[0].startswith("sparse_unsloth auto, by the first micro-batch: 177 tokens a micro-batch, 13% context")
    assert "so training is exact" in lines[1]
    assert "CUDA graphs need an NVIDIA GPU" in lines[2]
    assert "checkpointing is off, as you set it" in lines[3]


def test_many_context_tokens_train_by_rows(capsys):
    by_hand, ours = make_lora(), make_lora()
    attach(by_hand, "rows")
    attach(ours)
    for _ in range(2):
        same(loss_and_gradients(ours, PROMPTS), loss_and_gradients(by_hand, PROMPTS), rtol=0, atol=0)
    assert chosen(ours) == ROWS
    (lines,) = tables(capsys)
    assert "rows 0.25 " in lines[1]
    assert "context is 94% of your tokens: exact forward" in lines[1]


def test_answers_that_count_as_context_are_not_left_out(capsys):
    model = make_lora()
    attach(model, {"preset": "auto", "dense_tokens": "none"})
    loss_and_gradients(model, PROMPTS)
    assert chosen(model) == DENSE
    assert "rows of answers are never left out by size" in tables(capsys)[0][1]


def test_planning_leaves_the_random_state_as_it_was(monkeypatch):
    """Else a trainer would shuffle its data otherwise than without this package."""

    def draws(*args):
        drawn.append((torch.rand(()), random.random(), numpy.random.rand()))
        return padded(*args) if isinstance(args[0], list) else None

    drawn, model = [], make_lora()
    attach(model)
    monkeypatch.setattr(row_hooks, "probe", draws)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    plan_from_data(get_state(model), rows_of(PROMPTS), draws, batch_size=2, micro_batches=9)
    assert (chosen(model), len(drawn)) == (ROWS, 8 + 2 * 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize(("share", "expected"), [(1.0, DENSE), (0.5, (0.5, False))])
def test_what_is_set_by_hand_stays(share, expected):
    model = make_lora()
    attach(model, {"preset": "auto", "backward_rows": share})
    loss_and_gradients(model, PROMPTS)
    assert chosen(model) == expected


def test_graphs_by_hand_are_refused_without_a_gpu_as_ever():
    model = make_lora()
    with pytest.raises(AttachError, match="cuda_graphs: no layer of this model can be captured"):
        attach(model, {"preset": "auto", "cuda_graphs": True})
    assert get_state(model) is None


def test_rows_that_cannot_be_attached_are_left_and_the_table_says_why(monkeypatch, capsys):
    def fails(*args):
        raise AttachError("the MLP is no function of one row.")

    model = make_lora()
    attach(model)
    state = get_state(model)
    monkeypatch.setattr(row_hooks, "probe", fails)
    same(loss_and_gradients(model, PROMPTS), loss_and_gradients(make_lora(), PROMPTS), rtol=0, atol=0)
    assert get_state(model) is state
    assert chosen(model) == DENSE
    assert "the MLP is no function of one row." in tables(capsys)[0][1]


def test_a_sharded_model_is_left_as_it_is(capsys):
    model = make_lora()
    attach(model)
    next(model.parameters()).ds_id = 0
    loss_and_gradients(model, PROMPTS)
    assert chosen(model) == DENSE
    assert "sharded" in tables(capsys)[0][1]


def test_labels_that_tell_no_roles_train_exactly(monkeypatch, capsys):
    def fails(*args):
        raise ConfigError("labels are odd")

    model = make_lora()
    attach(model)
    monkeypatch.setattr(auto, "partition_of", lambda *args, **kwargs: fails())
    for _ in range(2):
        same(loss_and_gradients(model, PROMPTS), loss_and_gradients(make_lora(), PROMPTS), rtol=0, atol=0)
    assert chosen(model) == DENSE
    assert "training is exact, as nothing is predicted: labels are odd" in tables(capsys)[0][1]


def test_forwards_without_labels_are_told(caplog):
    model = make_lora()
    attach(model)
    with caplog.at_level(logging.WARNING, "sparse_unsloth"):
        model(input_ids=PROMPTS["input_ids"]).logits.sum().backward()
    assert "auto: training forwards come without labels" in caplog.text


def test_a_budget_keeps_layers_in_dense_training_too(capsys):
    plain, ours = make_lora(), make_lora()
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(ours, {"preset": "auto", "memory_budget": 20})
    same(loss_and_gradients(ours, ANSWERS), loss_and_gradients(plain, ANSWERS))
    state = get_state(ours)
    assert chosen(ours) == DENSE
    assert (state.planner.num_kept, state.auto.decision.kept) == (3, 3)
    assert "3 of 3 layers" in tables(capsys)[0][3]
    assert [layer.module.gradient_checkpointing for layer in state.layers] == [False] * 3


# -- Trainers ---------------------------------------------------------------------------------------------------------


def rows_of(batch, count=16):
    rows = [
        {name: tensor[0, :80].tolist() for name, tensor in batch.items() if name != "attention_mask"},
        {name: tensor[1, :59].tolist() for name, tensor in batch.items() if name != "attention_mask"},
    ]
    return rows * (count // 2)


def trainer_of(model, folder, data, **changes):
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "learning_rate": 1e-3, **changes,
    }  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, data_collator=padded)


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 2, "labels": -100}
    made = {
        name: torch.tensor([list(row[name]) + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    return made | {"attention_mask": (made["input_ids"] != 2).long()}


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_trainer_is_planned_by_a_sample_of_its_data(tmp_path, capsys):
    plain, ours = make_lora(), make_lora()
    attach(ours)
    expected = losses(trainer_of(plain, tmp_path, rows_of(ANSWERS)))
    trainer = trainer_of(ours, tmp_path, rows_of(ANSWERS))
    assert losses(trainer) == expected
    (lines,) = tables(capsys)
    assert lines[0].startswith("sparse_unsloth auto: ")
    assert "(8 read)" in lines[0]
    assert chosen(ours) == DENSE
    assert get_state(ours).auto.decision is None, "the next training is planned anew"
    trainer = trainer_of(ours, tmp_path, rows_of(PROMPTS))
    trainer.train()
    assert chosen(ours) == ROWS
    assert all(log["sparsity/enabled"] for log in trainer.state.log_history if "loss" in log)


def test_data_that_can_be_read_once_are_planned_by_the_first_micro_batch(tmp_path, capsys):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows_of(PROMPTS))

    model = make_lora()
    attach(model)
    trainer = trainer_of(model, tmp_path, Stream())
    trainer.train()
    (lines,) = tables(capsys)
    assert lines[0].startswith("sparse_unsloth auto, by the first micro-batch: ")
    assert chosen(model) == ROWS
    assert [log["sparsity/enabled"] for log in trainer.state.log_history if "loss" in log][1:] == [1, 1]


def test_a_trainer_with_a_loss_of_its_own_is_planned_without_rows(tmp_path, capsys, caplog):
    """Its data hold no labels; as TRL's DPOTrainer and GRPOTrainer from 1.15 on, it makes them for the model."""
    from transformers import Trainer

    class Preferences(Trainer):
        def compute_loss(self, model, inputs, **_):
            made = {name: value for name, value in inputs.items() if name != "completion"}
            return 2 * model(**made, labels=inputs["input_ids"].where(inputs["completion"] == 1, -100)).loss

    def collate(rows):
        batch = padded(rows)
        return batch | {"completion": (batch.pop("labels") != -100).long()}

    def train(sparsity):
        model, data = make_lora(), rows_of(PROMPTS)
        attach(model, sparsity)
        args = trainer_of(model, tmp_path, data, remove_unused_columns=False, max_steps=1).args
        Preferences(model=model, args=args, train_dataset=data, data_collator=collate).train()
        return chosen(model)

    assert train("auto") == DENSE
    assert "fell behind dense training" not in caplog.text
    assert train("rows") == ROWS
    assert "Preferences computes a loss of its own: row sparsity in DPO fell behind dense training" in caplog.text
    (lines,) = tables(capsys)
    assert "100% context" in lines[0]
    assert "Preferences computes a loss of its own" in lines[1]


@pytest.mark.parametrize("how", ["compute_loss", "compute_loss_func", "label_smoothing_factor"])
def test_data_with_labels_and_another_loss_are_planned_without_rows(how, tmp_path, caplog):
    from transformers import Trainer

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, **_):
            return 2 * model(**inputs).loss

    def loss(outputs, labels, **_):
        return outputs.logits.flatten(0, 1)[labels.flatten() != -100].logsumexp(-1).mean()

    model, data = make_lora(), rows_of(PROMPTS)
    attach(model)
    changes = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    args = trainer_of(model, tmp_path, data, max_steps=1, **changes).args
    kind, more = (Weighted, {}) if how == "compute_loss" else (Trainer, {})
    if how == "compute_loss_func":
        more = {"compute_loss_func": loss}
    kind(model=model, args=args, train_dataset=data, data_collator=padded, **more).train()
    assert chosen(model) == DENSE
    assert "fell behind dense training" not in caplog.text


def test_a_classifier_is_planned_without_rows(capsys):
    model = make_classifier()
    attach(model)
    batch = {"input_ids": torch.randint(3, 90, (2, 40)), "labels": torch.tensor([0, 1])}
    model.train()(**batch).loss.backward()
    assert chosen(model) == DENSE
    (lines,) = tables(capsys)
    assert "98% context" in lines[0]
    assert "reads one row of a sequence" in lines[1]


def test_a_resumed_training_is_planned_again(tmp_path, capsys):
    model = make_lora()
    attach(model)
    trainer_of(model, tmp_path, rows_of(PROMPTS), save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert SparsityConfig.from_file(folder / CONFIG_NAME) == SparsityConfig(preset="auto")
    assert SparsityConfig.from_file(folder / CONFIG_NAME).model_fields_set == {"preset"}
    assert SparsityConfig.from_file(folder / PLAN_NAME).backward_rows == 0.25
    again = make_lora()
    attach(again)
    capsys.readouterr()
    trainer = trainer_of(again, tmp_path, rows_of(PROMPTS))
    trainer.train(resume_from_checkpoint=str(folder))
    assert tables(capsys)[0][0].startswith("sparse_unsloth auto, resumed after step 2: ")
    assert chosen(again) == ROWS


def test_trls_trainer(tmp_path, capsys):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sparse_unsloth import FastSparseLanguageModel

    folder = save_checkpoint(tmp_path / "model")
    model, _ = FastSparseLanguageModel.from_pretrained(folder, 128, load_in_4bit=False, backend="peft")
    model = FastSparseLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    words = " ".join(f"w{3 + number % 90}" for number in range(60))
    data = Dataset.from_list([{"prompt": words, "completion": " w5 w6"}] * 8)
    settings = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=data,
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, bf16=False, **settings),
    ).train()
    assert chosen(model) == ROWS
    assert "rows 0.25" in tables(capsys)[0][1]


# -- The forecast against the measured time ---------------------------------------------------------------------------

FORECAST = StepTime(products=1e9, attention=1e9, rows=1, sparse_rows=1, host_layer=1, host_sparse_part=1)
"""Of a device so slow that it decides every step of the tiny model."""


@pytest.fixture
def clock(monkeypatch):
    """``clock.seconds`` pass between two forwards; steps are predicted by `FORECAST`."""
    ticking = SimpleNamespace(now=0.0, seconds=0.0)

    def read():
        ticking.now += ticking.seconds
        return ticking.now

    fitted = SimpleNamespace(step_time=FORECAST, device="a slow GPU", backend="peft", dtype="bf16")
    monkeypatch.setattr(auto, "clock", read)
    monkeypatch.setattr(auto, "_fitted", lambda state: fitted)
    return ticking


@pytest.mark.parametrize(("wrong", "expected"), [(1.0, ROWS), (1.1, ROWS), (3.0, ROWS), (1e-6, DENSE)])
def test_a_plan_that_was_wrong_is_mended_once(clock, capsys, wrong, expected):
    model = make_lora()
    attach(model)
    loss_and_gradients(model, PROMPTS)
    state = get_state(model)
    clock.seconds = wrong * state.auto.decision.milliseconds / 1000
    for _ in range(WARM_UP + MEASURED + 1):
        assert chosen(model) == ROWS
        model(**PROMPTS).loss.backward()
    assert chosen(model) == expected
    assert get_state(model) is state
    assert state.auto.watch is None
    said = capsys.readouterr().out
    assert f"({wrong - 1:+.0%})" in said
    assert said.count("auto, mended") == (expected == DENSE)
    assert said.count("measured, ") == 1
    reference = make_lora()
    if expected == ROWS:
        attach(reference, "rows")
    same(loss_and_gradients(model, PROMPTS), loss_and_gradients(reference, PROMPTS), rtol=0, atol=0)


def test_gradients_that_were_accumulated_before_stay_when_a_plan_is_mended(clock):
    model = make_lora()
    attach(model)
    loss_and_gradients(model, PROMPTS)
    clock.seconds = 1e-9
    while chosen(model) == ROWS:
        before = {name: tensor.grad.clone() for name, tensor in loras(model).items()}
        loss = model(**PROMPTS).loss
    loss.backward()
    _, alone = loss_and_gradients(make_lora(), PROMPTS)
    model_now = {name: tensor.grad for name, tensor in loras(model).items()}
    for name, gradient in alone.items():
        torch.testing.assert_close(model_now[name], before[name] + gradient)


def test_a_trainer_goes_on_after_its_plan_was_mended(clock, tmp_path, capsys):
    model = make_lora()
    attach(model)
    clock.seconds = 1e-9
    trainer = trainer_of(model, tmp_path, rows_of(PROMPTS), max_steps=(WARM_UP + MEASURED) // 2 + 3)
    trainer.train()
    enabled = [log.get("sparsity/enabled", 0) for log in trainer.state.log_history if "loss" in log]
    assert enabled[0] == 1
    assert enabled[-1] == 0
    assert get_state(model).driver is None
    assert get_state(model).auto.decision is None, "the trainer still drives it, and ended the training"
    assert "auto, mended" in capsys.readouterr().out
