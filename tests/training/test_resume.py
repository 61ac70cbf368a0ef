"""Tests resumed runs: what a finished run keeps, what its metrics cover, and which checkpoints are refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from sparse_unsloth.cli import main
from sparse_unsloth.training.recipe import load_recipe
from sparse_unsloth.training.run import run as train
from sparse_unsloth.utils.checkpoints import CheckpointError, check_checkpoint, last_whole_checkpoint

from word_models import questions, save_checkpoint, save_recipe, save_rows

SIZES = [(4 + index % 5, 1 + index % 3) for index in range(40)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Seven steps of other samples each, logged every three and saved every two."""
    folder = tmp_path_factory.mktemp("recipe")
    model = save_checkpoint(folder / "model", num_hidden_layers=2)
    rows = save_rows(folder / "rows.jsonl", questions(SIZES))
    keys = {
        "model_name_or_path": model, "dataset_name": rows, "backend": "peft", "bf16": False, "use_cpu": True,
        "max_length": 32, "max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 0.01, "lora_r": 4,
        "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3,
        "disable_tqdm": True, "sparsity": {"mlp": {"all": 0.5}, "estimator": {"kind": "svd"}, "start_step": 2},
    }  # fmt: skip
    return save_recipe(folder / "r.yaml", keys)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run without interruptions."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", recipe, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """Of that run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(left, right):
    left, right = weights_of(left), weights_of(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def named(caplog):
    return " ".join(record.getMessage() for record in caplog.records if record.name == "sparse_unsloth")


# -- Finished runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--max_steps", "3"],
        ["--resume_from_checkpoint", "{run}/checkpoint-2"],
        ["--resume_from_checkpoint", "{run}"],
        ["--learning_rate", "0.1", "--save_only_model"],
        ["--max_steps", "-1", "--num_train_epochs", "0.5"],
    ],
)
def test_a_finished_run_stays_as_it_is(recipe, whole, words, capsys):
    before = contents(whole)
    words = [word.format(run=whole) for word in words]
    assert main(["train", recipe, "--output_dir", str(whole), "--resume_from_checkpoint", *words]) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert "(7 steps)" in printed
    assert "trained" not in printed
    assert contents(whole) == before


def test_a_finished_run_without_checkpoints_stays_too_and_cannot_be_longer(recipe, tmp_path, capsys):
    words = ["train", recipe, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no", "--max_steps", "1"]
    assert main(words) == 0
    before = contents(tmp_path / "run")
    assert main([*words, "--resume_from_checkpoint"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*words, "--resume_from_checkpoint", "--max_steps", "2"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_finished_run_can_be_trained_longer(recipe, copy, caplog):
    done = metrics_of(copy)
    assert main(["train", recipe, "--output_dir", str(copy), "--max_steps", "8", "--resume_from_checkpoint"]) == 0
    assert "max_steps: 7 before, 8 now" in named(caplog)
    assert metrics_of(copy)["steps"] == 8
    assert json.loads((copy / "metrics-7-steps.json").read_text()) == done, "nothing is lost"
    log = [entry["loss"] for entry in metrics_of(copy)["log"] if "loss" in entry]
    assert log[:2] == [entry["loss"] for entry in done["log"] if "loss" in entry]


def test_a_run_that_ended_after_its_last_step_takes_no_other_one(recipe, copy, whole):
    """It was killed between its last checkpoint and its figures."""
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "adapter")
    before = contents(copy / "checkpoint-7")
    assert main(["train", recipe, "--output_dir", str(copy), "--resume_from_checkpoint"]) == 0
    found, expected = metrics_of(copy), metrics_of(whole)
    assert (found["steps"], found["train_loss"]) == (7, pytest.approx(expected["train_loss"], rel=1e-6))
    assert_same_adapter(copy / "adapter", whole / "adapter")
    assert contents(copy / "checkpoint-7") == before


# -- Figures of the whole run -----------------------------------------------------------------------------------------


def test_losses_and_times_are_of_the_whole_run(recipe, whole, tmp_path, caplog):
    """Killed before the first checkpoint, twice after the first one, and once more."""
    words = ["--output_dir", str(tmp_path / "run")]
    for number, step in enumerate((1, 3, 3, 5)):
        resumed = [*words, "--resume_from_checkpoint"] if number else words
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(recipe, resumed), (Killed(step),))
    assert "was interrupted before its first checkpoint, and begins again" in named(caplog)
    assert main(["train", recipe, *words, "--resume_from_checkpoint"]) == 0

    found, expected = metrics_of(tmp_path / "run"), metrics_of(whole)
    assert_same_adapter(tmp_path / "run" / "adapter", whole / "adapter")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    losses = [[entry["loss"] for entry in one["log"] if "loss" in entry] for one in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "those between a log line and an interruption too"
    assert [entry.get("num_tokens") for entry in found["log"]] == [e.get("num_tokens") for e in expected["log"]]
    times = found["step_times"]
    assert times["sparse"] == expected["step_times"]["sparse"]
    assert (len(times["seconds"]), times["starts"]) == (7, [0, 2, 4])
    assert found["tokens"] == expected["tokens"]
    warm = [seconds for index, seconds in enumerate(times["seconds"]) if index not in times["starts"]]
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / 7 * 4 / sum(warm))
    assert found["train_seconds"] > sum(times["seconds"])
    last = found["log"][-1]
    assert last["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert sum(times["seconds"]) < last["train_runtime"] <= found["train_seconds"] + 1e-3
    assert last["train_steps_per_second"] == pytest.approx(7 / last["train_runtime"], rel=0.02)


# -- Checkpoints that cannot be resumed from --------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("trainer_state.json", Path.unlink, "trainer_state.json, which is written last, is missing"),
        ("trainer_state.json", cut, "trainer_state.json, which is written last, is damaged"),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors is damaged"),
        ("adapter_model.safetensors", Path.unlink, "it holds no weights"),
        ("optimizer.pt", cut, "optimizer.pt is damaged"),
        ("scheduler.pt", Path.unlink, "it holds no scheduler"),
        ("rng_state.pth", lambda path: path.write_bytes(b""), "rng_state.pth is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(copy, name, damage, fault, caplog):
    damage(copy / "checkpoint-7" / name)
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-6")
    assert "checkpoint-7 is not whole, so it is passed over" in named(caplog)
    assert fault in named(caplog)
    with pytest.raises(CheckpointError, match=r"checkpoint-7 is not whole: .*Take .*checkpoint-6, which is"):
        check_checkpoint(copy / "checkpoint-7")


def test_the_run_goes_on_from_the_checkpoint_before(recipe, copy, whole, capsys):
    (copy / "metrics.json").unlink()
    cut(copy / "checkpoint-7" / "adapter_model.safetensors")
    words = ["train", recipe, "--output_dir", str(copy), "--resume_from_checkpoint"]
    assert main([*words, str(copy / "checkpoint-7")]) == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err
    assert main(words) == 0
    assert_same_adapter(copy / "adapter", whole / "adapter")

    (copy / "metrics.json").unlink()
    for step in (2, 4, 6, 7):
        (copy / f"checkpoint-{step}" / "trainer_state.json").unlink()
    before = contents(copy)
    assert main(words) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize("where", [True, False])
def test_a_checkpoint_without_its_optimizer_is_refused(recipe, copy, where, capsys):
    """As save_only_model leaves them."""
    for step in (2, 4, 6, 7):
        for path in (copy / f"checkpoint-{step}").iterdir():
            if path.name.startswith(("optimizer", "scheduler", "rng_state")):
                path.unlink()
    (copy / "metrics.json").unlink()
    before = contents(copy)
    words = [str(copy / "checkpoint-4")] if where else []
    assert main(["train", recipe, "--output_dir", str(copy), "--resume_from_checkpoint", *words]) == 2
    said = capsys.readouterr().err
    assert "holds no optimizer state (save_only_model: true leaves it out)" in said
    assert "--model_name_or_path" in said
    assert contents(copy) == before


# -- Other settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "0.1", "--warmup_steps", "1"], "learning_rate: 0.01 before, 0.1 now; warmup_steps: "),
        (["--sparsity.mlp", '{"all": 0.25}'], "sparsity.mlp: {'all': 0.5} before, {'all': 0.25} now"),
        (["--per_device_train_batch_size", "2"], "per_device_train_batch_size: 4 before, 2 now"),
        (["--dataset_size", "30"], "The training data are not those that"),
    ],
)
def test_other_settings_are_named(recipe, copy, tmp_path, words, message, caplog):
    shutil.rmtree(copy / "checkpoint-7")
    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(copy)]
    assert main(["train", recipe, *elsewhere, *words]) == 0
    assert f"{copy / 'checkpoint-6'}" in named(caplog)
    assert message in named(caplog)


@pytest.mark.parametrize("words", [["--lora_r", "8"], ["--lora_alpha", "64"], ["--lora_target_modules", "q_proj"]])
def test_settings_that_the_adapter_does_not_fit_are_refused(recipe, copy, tmp_path, words, capsys):
    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(copy / "checkpoint-6")]
    assert main(["train", recipe, *elsewhere, *words]) == 2
    assert f"was made with other settings ({words[0][2:]}: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_finished_run_is_not_overwritten_by_resuming_this_one(recipe, whole, copy, capsys):
    before = contents(whole)
    words = ["--output_dir", str(whole), "--resume_from_checkpoint", str(copy / "checkpoint-2")]
    assert main(["train", recipe, *words]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert contents(whole) == before


# -- Training on from an adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "adapter", "checkpoint-4"])
def test_training_goes_on_from_an_adapter(recipe, whole, tmp_path, part, capsys):
    words = ["--model_name_or_path", str(whole / part), "--output_dir", str(tmp_path / "next"), "--max_steps", "1"]
    words += ["--learning_rate", "1e-9", "--save_strategy", "no", "--sparsity", "rows"]
    assert main(["train", recipe, *words]) == 0
    printed = capsys.readouterr().out
    assert "training goes on from the adapter in" in printed
    assert "backward through 0.25 of the context tokens" in printed, "the recipe's sparsity, not the adapter's"
    left, right = weights_of(whole / (part or "adapter")), weights_of(tmp_path / "next" / "adapter")
    assert all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)
    assert any(not torch.equal(left[name], right[name]) for name in left)

    from sparse_unsloth.evaluation.model import find_source, load

    source = find_source(str(tmp_path / "next"))
    assert (
        source.model == json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    if part == "adapter":
        load(source)
        assert main(["train", recipe, *words, "--lora_r", "8"]) == 2
        assert "--lora_r: the adapter in" in capsys.readouterr().err


def test_a_run_without_an_adapter_says_where_one_is(recipe, copy, capsys):
    shutil.rmtree(copy / "adapter")
    assert main(["train", recipe, "--model_name_or_path", str(copy), "--output_dir", str(copy / "next")]) == 2
    assert f"Name its last checkpoint, {copy / 'checkpoint-7'}" in capsys.readouterr().err
