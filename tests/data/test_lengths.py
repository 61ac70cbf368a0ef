"""Tests that samples too long or without a loss token are counted, left out with a reason, or refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers

from sparse_unsloth.cli import main
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.datasets import LengthFilter, length_filter, load_dataset_for
from sparse_unsloth.data.ledger import Ledger, drop_without_loss

import word_models
from word_models import TOOLS, chat, questions, share_gpt, text

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}<user> {{ tool['name'] }} "
    + f"{text(9)} {{% endfor %}}{{% endif %}}"
    + word_models.TEMPLATE
)
"""Ten tokens for a tool's name and description."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return word_models.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def training(checkpoint, tmp_path, monkeypatch):
    """A recipe of one step on rows; ``run`` trains it and returns the exit code and the metrics."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    recipe = {
        "model_name_or_path": checkpoint, "backend": "peft", "bf16": False, "use_cpu": True, "max_steps": 1,
        "per_device_train_batch_size": 2, "lora_r": 4, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "report_to": "none", "sparsity": "dense", "chat_template_path": str(template),
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip

    def run(rows, *options, **changes):
        file = word_models.save_rows(tmp_path / "rows.jsonl", rows)
        source = word_models.save_recipe(tmp_path / "recipe.yaml", recipe, dataset_name=file, **changes)
        code = main(["train", source, *options])
        metrics = tmp_path / "run" / "metrics.json"
        return code, json.loads(metrics.read_text()) if metrics.is_file() else None

    run.recipe = tmp_path / "recipe.yaml"
    return run


FORMS = {
    "pair": lambda question, answer: {"question": text(question), "answer": text(answer)},
    "tools": lambda question, answer: {"question": text(question), "answer": text(answer), "tools": json.dumps(TOOLS)},
    "plain": lambda question, answer: {"prompt": text(question) + " ", "completion": text(answer)},
    "text": lambda question, answer: {"text": text(question + answer)},
    "messages": lambda question, answer: {
        "messages": chat(("user", text(question)), ("assistant", text(answer))), "tools": TOOLS
    },
    "conversations": lambda question, answer: share_gpt(("human", text(question)), ("gpt", text(answer))),
    "tokens": lambda question, answer: {"input_ids": [4] * (question + answer)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_lengths_are_those_that_trl_trains(checkpoint, tmp_path, monkeypatch, form):
    from trl import SFTConfig, SFTTrainer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    arguments = DataArguments(
        dataset_name=word_models.save_rows(tmp_path / "rows.jsonl", [FORMS[form](3, 2), FORMS[form](9, 4)]),
        dataset_drop_long=True,
    )
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    args = SFTConfig(str(tmp_path / "out"), chat_template_path=str(tmp_path / "template.jinja"), **options)
    data, _ = load_dataset_for(arguments)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    trained = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset
    count = length_filter(arguments, checkpoint, 99, args)
    lengths = [len(ids) for ids in trained["input_ids"]]
    assert [count.length(row) for row in data] == lengths
    assert form not in ("tools", "messages") or lengths[0] > 15
    ledger = Ledger()
    count.max_length = lengths[0]
    kept, _ = load_dataset_for(arguments, fits=count, ledger=ledger)
    assert len(kept) == 1
    assert ledger.split("training").left_out == {"longer than max_length": 1}


def test_lengths_are_those_of_the_template_that_trl_trains_with(checkpoint, tmp_path, monkeypatch):
    """For a loss on the assistant's turns it takes another one than the tokenizer's."""
    import trl

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    arguments = DataArguments(
        dataset_name=word_models.save_rows(
            tmp_path / "rows.jsonl", [share_gpt(("human", "one"), ("gpt", "two"), ("human", "three"), ("gpt", "four"))]
        ),
        dataset_drop_long=True,
    )
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None, "assistant_only_loss": True}
    args = trl.SFTConfig(str(tmp_path / "out"), chat_template_path=str(template), **options)
    data, _ = load_dataset_for(arguments)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    trained = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset
    count = length_filter(arguments, checkpoint, 99, args)
    assert count.length(data[0]) == len(trained[0]["input_ids"])
    count.chat_template = None
    assert count.length(data[0]) < len(trained[0]["input_ids"]), "the tokenizer's own leaves out a turn's thoughts"


def test_length_filter_of_two_words_stays(checkpoint):
    """The filter's form before it supported TRL's other forms."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert LengthFilter(tokenizer, 4)({"prompt": "one ", "completion": "two three"})
    assert not LengthFilter(tokenizer, 3)({"prompt": "one ", "completion": "two three"})


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"completion_only_loss": True}])
def test_prompts_that_fill_max_length_are_an_error(training, capsys, changes):
    """The message is that of `estimate`."""
    code, metrics = training(questions([(90, 3)] * 6), max_length=64, **changes)
    assert (code, metrics) == (2, None)
    said = capsys.readouterr().err
    assert "none of 6 samples has a loss token. Either the prompts alone fill max_length (64)" in said
    assert main(["estimate", str(training.recipe)]) == 2
    assert said.strip().splitlines()[-1] == capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("changes", [{}, {"packing": True}])
def test_answers_that_are_cut_away_are_counted(training, caplog, changes):
    rows = [*questions([(90, 3)] * 3 + [(8, 2)] * 4 + [(58, 9)]), {"question": "one", "answer": ""}]
    code, metrics = training(rows, max_length=64, dataset_test_size=1, dataset_size=9, **changes)
    assert code == 0
    found = metrics["data"]["training"]
    kept = found["kept"]
    assert found["read"] == 9
    assert found["left_out"]["without an answer"] == 1
    cut = found["left_out"]["without a loss token within max_length"]
    assert cut + kept == 7
    assert 2 <= cut <= 3
    said = [record.getMessage() for record in caplog.records]
    sentence = f"{cut} of 7 samples are left out: they have no loss token within max_length. Raise max_length"
    assert sum(sentence in line for line in said) == 1
    assert any("1 of 9 samples left out: 1 without an answer" in line for line in said)


def test_half_of_the_evaluation_may_not_be_cut_away_in_silence(training, caplog):
    code, metrics = training(questions([(90, 3), (8, 2)] * 20), max_length=64, dataset_test_size=20, do_eval=True)
    assert code == 0
    held_out = metrics["data"]["held-out"]
    assert held_out["read"] == 20 == held_out["kept"] + sum(held_out["left_out"].values())
    assert held_out["left_out"]["without a loss token within max_length"] > 0
    assert any("held-out split: " in record.getMessage() for record in caplog.records)


def test_drop_long_counts_tools(training):
    """Without the tool each sample has 15 tokens, with it 25: cut at 20, the answer would be gone."""
    row = {"question": text(8), "answer": text(3)}
    rows = [{**row, "tools": json.dumps(TOOLS)}] * 4 + [{**row, "tools": ""}] * 4
    code, metrics = training(rows, max_length=20, dataset_drop_long=True)
    assert code == 0
    assert metrics["data"]["training"]["left_out"] == {"longer than max_length": 4}
    assert metrics["data"]["training"]["as_long_as_max_length"] == 0


def test_drop_long_counts_plain_texts(training):
    code, metrics = training([{"text": text(count)} for count in (5, 40, 6)], max_length=20, dataset_drop_long=True)
    assert code == 0
    assert metrics["data"]["training"]["left_out"] == {"longer than max_length": 1}
    assert metrics["data"]["columns"]["used"] == {"text": ["text"]}


@pytest.mark.parametrize("prepare", [True, False])
def test_tokens_without_a_label_are_counted(training, prepare):
    """Whatever TRL prepares: a batch without labels has no loss, and its mean would be NaN."""
    rows = [
        {"input_ids": [4, 5, 6, 7], "labels": labels}
        for labels in ([-100, -100, 6, 7], [-100] * 4, [4, -100, -100, -100])
    ]
    kwargs = {} if prepare else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    code, metrics = training(rows * 2, max_length=8, per_device_train_batch_size=1, max_steps=4, **kwargs)
    assert code == 0
    assert metrics["data"]["training"]["kept"] == 2
    assert metrics["data"]["training"]["left_out"] == {"without a loss token within max_length": 4}
    assert torch.isfinite(torch.tensor(metrics["train_loss"]))


@pytest.mark.parametrize(
    ("columns", "completion_only", "kept"),
    [
        ({"labels": [[-100, 5], [-100, -100], [5, -100]]}, True, [0]),
        ({"completion_mask": [[0, 1], [0, 0], [1, 0]]}, True, [0]),
        ({"completion_mask": [[0, 1], [0, 0], [1, 0]]}, False, [0, 1, 2]),
        ({"completion_mask": [[0, 1], [0, 1], [0, 0]], "assistant_masks": [[0, 1], [1, 0], [0, 1]]}, True, [0]),
        ({"labels": [[-100, 5], [-100, 5], [-100, 5]], "seq_lengths": [[2], [1, 1], [2]]}, True, [0, 2]),
        ({}, True, [0, 1, 2]),
    ],
)
def test_rows_without_loss_of_every_layout_go(columns, completion_only, kept):
    """Unsloth's rows have masks and no labels; the first token of a packed document is predicted by none."""
    rows = datasets.Dataset.from_dict({"input_ids": [[4, 5]] * 3, **columns, "row": [0, 1, 2]})
    trainer = SimpleNamespace(train_dataset=rows, completion_only_loss=completion_only)
    lengths, documents, of_rows = drop_without_loss(trainer, "train_dataset")
    assert trainer.train_dataset["row"][:] == kept == of_rows.nonzero()[0].tolist()
    assert lengths.sum() == 6
    assert documents.sum() == len(kept)


def test_conversations_train_on_the_assistants_turns(training):
    rows = [
        share_gpt(("human", text(3)), ("gpt", text(2)), ("human", text(4)), ("gpt", text(1)), tools=json.dumps(TOOLS))
    ]
    rows += [share_gpt(("human", text(3)), ("gpt", ""), tools="")]
    code, metrics = training(rows * 4, assistant_only_loss=True, max_length=64, sparsity="rows")
    assert code == 0
    assert metrics["data"]["training"]["left_out"] == {"without an answer": 4}


@pytest.mark.parametrize("drop_long", [False, True])
def test_a_conversation_that_the_template_refuses_is_one_line(training, tmp_path, capsys, drop_long):
    strict = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + word_models.TEMPLATE
    )
    (tmp_path / "strict.jinja").write_text(strict)
    rows = [{"messages": chat(("assistant", "one"))}] * 2
    changes = {"chat_template_path": str(tmp_path / "strict.jinja"), "assistant_only_loss": True, "max_length": 64}
    code, _ = training(rows, dataset_drop_long=drop_long, **changes)
    assert code == 2
    assert "the chat template refuses a conversation: user first" in capsys.readouterr().err
    assert main(["estimate", str(training.recipe)]) == 2
    assert "user first" in capsys.readouterr().err
