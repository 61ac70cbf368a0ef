"""Tests `sparse-unsloth train` and `quickstart` from end to end on a tiny model."""

import importlib.metadata
import io
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from sparse_unsloth.cli import main
from sparse_unsloth.config.sparsity import CONFIG_NAME
from sparse_unsloth.training.recipe import load_recipe
from sparse_unsloth.training.run import build_trainer

from flops import counter
from word_models import save_recipe

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Llama with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["<unk>", "<end>", "<user>", "<assistant>", "what", "is", "after", *NUMBERS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def training(checkpoint, tmp_path):
    """A recipe of four steps, of which the second and third are sparse."""
    rows = [{"question": f"what is after {NUMBERS[i % 9]}", "answer": NUMBERS[i % 9 + 1]} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "backend": "peft",
        "bf16": False,
        "use_cpu": True,
        "max_length": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lora_r": 4,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
        "sparsity": {"mlp": {"all": 0.5}, "self_attn": {"1": 0.5}, "start_step": 1, "end_step": 3},
    }
    return save_recipe(tmp_path / "tiny.yaml", recipe)


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("is_terminal", "given", "shown"), [(False, [], False), (True, [], True),
    (False, ["--disable_tqdm", "false"], True), (True, ["--disable_tqdm", "true"], False)])  # fmt: skip
def test_the_trainers_bar_is_on_terminals(training, is_terminal, given, shown, monkeypatch):
    recipe = yaml.safe_load(Path(training).read_text())
    del recipe["disable_tqdm"]
    Path(training).write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal, write=len, flush=int))
    callbacks = build_trainer(load_recipe(training, given))[0].callback_handler.callbacks
    assert any(isinstance(one, ProgressCallback) for one in callbacks) == shown
    assert any(isinstance(one, PrinterCallback) for one in callbacks) != shown, "losses are printed, with or without"


def test_training_writes_a_run_folder(training, tmp_path, capsys):
    assert main(["train", training]) == 0
    run = tmp_path / "run"
    assert f"trained 4 steps; adapter and metrics are in {run}" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["step_times"]["sparse"] == [False, True, True, False]
    assert set(metrics["median_step_seconds"]) == {"dense", "sparse"}
    logged = [entry for entry in metrics["log"] if "loss" in entry]
    assert [entry["sparsity/enabled"] for entry in logged] == [0.0, 1.0, 1.0, 0.0]
    assert all(0 < entry["sparsity/context_share"] < 1 for entry in logged)
    assert json.loads((run / "environment.json").read_text())["packages"]["trl"]

    resolved = load_recipe(run / "recipe.yaml")
    assert resolved.sparsity == load_recipe(training).sparsity
    assert resolved.training.max_steps == 4


@pytest.mark.parametrize(
    ("terminal", "words", "drawn"),
    [
        (False, [], False),
        (True, [], True),
        (False, ["--disable_tqdm", "false"], True),
        (True, ["--disable_tqdm"], False),
    ],
)
def test_the_trainers_bar_is_drawn_on_terminals_alone(terminal, words, drawn, training, tmp_path, monkeypatch, capsys):
    recipe = Path(training)
    recipe.write_text(recipe.read_text().replace("disable_tqdm: true\n", ""))
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["train", training, "--max_steps", "2", "--save_strategy", "no", *words]) == 0
    assert bool(re.search(r"\d/2 \[", stream.getvalue())) == drawn
    assert capsys.readouterr().out.count("'loss'") == 2, "log lines are printed in any case"
    assert ("disable_tqdm" in (tmp_path / "run" / "recipe.yaml").read_text()) == bool(words)


def test_adapter_loads_without_this_package(training, checkpoint, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["train", training]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "run" / "adapter")
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_finished_run_is_not_overwritten(training, tmp_path, capsys):
    assert main(["train", training, "--max_steps", "1", "--save_strategy", "no"]) == 0
    before = (tmp_path / "run" / "metrics.json").read_text()
    assert main(["train", training]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_text() == before


@pytest.mark.parametrize("estimator", ["svd", "prior"])
def test_resumed_training_ends_where_the_whole_one_does(training, tmp_path, estimator):
    words = ["train", training, "--sparsity.estimator.kind", estimator]
    assert main(words) == 0
    whole, run = adapter(tmp_path / "run"), tmp_path / "run"
    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main([*words, *elsewhere]) == 0
    assert_same(whole, adapter(tmp_path / "other"))

    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    assert main([*words, "--resume_from_checkpoint"]) == 0
    assert_same(whole, adapter(run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step_times"]["sparse"] == [False, True, True, False], "the schedule goes on at the third step"


def test_a_backward_pass_through_few_rows_trains_and_resumes(training, tmp_path, capsys):
    """The log names the method, and the result after a checkpoint is bitwise identical."""
    words = ["train", training, "--sparsity", "rows"]
    assert main(words) == 0
    run = tmp_path / "run"
    assert "exact forward; backward through 0.25 of the context tokens" in capsys.readouterr().out
    assert load_recipe(run / "recipe.yaml").sparsity.backward_rows == 0.25
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step_times"]["sparse"] == [True] * 4
    logged = [entry for entry in metrics["log"] if "loss" in entry]
    assert [entry["sparsity/backward_rows"] for entry in logged] == [0.25] * 4
    assert not any("sparsity/mean_mlp" in entry for entry in logged)
    assert "energy" in (run / "explain.md").read_text()

    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main([*words, *elsewhere]) == 0
    resumed = json.loads((tmp_path / "other" / "metrics.json").read_text())["log"]
    assert [(e["loss"], e["grad_norm"]) for e in resumed if "loss" in e] == [
        (e["loss"], e["grad_norm"]) for e in logged
    ]
    whole, other = adapter(run), adapter(tmp_path / "other")
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert main(["explain", str(run)]) == 0
    assert "share of the gradient's energy" in capsys.readouterr().out


def test_a_dense_phase_of_few_rows_is_dense(training, tmp_path):
    words = ["train", training, "--sparsity", "rows", "--sparsity.start_step", "1", "--sparsity.end_step", "3"]
    assert main([*words, "--save_strategy", "no"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["step_times"]["sparse"] == [False, True, True, False]
    logged = [entry["sparsity/backward_rows"] for entry in metrics["log"] if "loss" in entry]
    assert logged == [0.0, 0.25, 0.25, 0.0]


def test_rank_block_trains_resumes_and_leaves_a_pruned_adapter(training, checkpoint, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = {"target_density": 0.5, "warmup_steps": 1, "prune_after": 1, "retain_ratio": 0.25, "score_rows": 32}
    words = ["train", training, *(word for key, value in options.items() for word in (f"--rank.{key}", str(value)))]
    assert main(words) == 0
    run = tmp_path / "run"
    whole, pruned = (
        adapter(run),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), run / "adapter-pruned"),
    )
    resolved = load_recipe(run / "recipe.yaml")
    assert vars(resolved.rank) == options | {"importance_lambda": 1.0, "importance_decay": 0.95}
    assert {len(p) for n, p in pruned.named_parameters() if "lora_A" in n} == {1}
    assert any((tensor == 0).all(1).any() for name, tensor in whole.items() if "lora_A" in name), "some were pruned"
    assert (run / "checkpoint-2" / "rank_state.safetensors").is_file()

    shutil.rmtree(run / "checkpoint-4")
    assert main([*words, "--resume_from_checkpoint"]) == 0
    assert_same(whole, adapter(run))
    assert main([*words, "--rank.target_density", "1", "--output_dir", str(tmp_path / "all")]) == 0
    assert any((adapter(tmp_path / "all")[name] - whole[name]).abs().max() > 1e-5 for name in whole)


def test_rank_benchmark_measures_and_goes_on_where_it_stopped(training, checkpoint, tmp_path, capsys):
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "rank.py"
    spec = importlib.util.spec_from_file_location("rank_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    words = f"speed --model {checkpoint} --backend peft --rank 32 --density 0.25 --baseline 8 --batch 1 --length 16"
    benchmark.main([*words.split(), "--steps", "2", "--rounds", "1", "--out", str(tmp_path / "out")])
    assert "no LoRA at all would be" in capsys.readouterr().out
    rows = benchmark.read_csv(tmp_path / "out" / "speed.csv")
    low, high, sparse = (float(row["step_flops"]) - float(row["base_flops"]) for row in rows)
    assert (high, sparse) == (4 * low, low), "LoRA's FLOPs go with the components that are computed"

    words = f"quality --recipe {training} --steps 3 --rank 16 --densities 0.25 --baseline 4 --warmup 1 --seeds"
    held_out = ["--", "--dataset_test_size", "9", "--save_strategy", "no"]
    for seeds in ("0", "0 1"):
        for folder in tmp_path.glob("run*"):
            shutil.rmtree(folder)
        benchmark.main([*words.split(), *seeds.split(), "--out", str(tmp_path / "out"), *held_out])
    printed = capsys.readouterr().out
    assert "sparse r=16 at 0.25: answer loss" in printed
    assert "2 seeds" in printed
    rows = benchmark.read_csv(tmp_path / "out" / "quality.csv")
    assert [row["seed"] for row in rows] == list("000111"), "the first seed's runs were not run again"
    assert [row["answer_loss_all"] != "" for row in rows] == [False, False, True] * 2
    benchmark.main(["summary", str(tmp_path / "out")])
    assert printed.endswith(capsys.readouterr().out)
    shutil.rmtree(tmp_path / "out")
    benchmark.main([*words.split(), "0", "--seconds", "0", "--out", str(tmp_path / "out"), *held_out])
    assert "Stopped before" in capsys.readouterr().out


def test_dense_run_differs_from_sparse_run(training, tmp_path):
    assert main(["train", training]) == 0
    assert main(["train", training, "--sparsity", "dense", "--output_dir", str(tmp_path / "dense")]) == 0
    assert not json.loads((tmp_path / "dense" / "metrics.json").read_text())["step_times"]["sparse"][1]
    sparse, dense = adapter(tmp_path / "run"), adapter(tmp_path / "dense")
    assert any((sparse[name] - dense[name]).abs().max() > 1e-5 for name in dense)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--resume_from_checkpoint"], 2, "there is no checkpoint in"),
        (["--resume_from_checkpoint", "none"], 2, "there is no folder none"),
        (["--model_name_or_path", "/none"], 2, "model_name_or_path: '/none' cannot be loaded"),
        (["--model_name_or_path", "pypi:other"], 2, "'pypi:other' is unknown"),
        (["--dataset_name", "none.jsonl"], 2, "there is no file none.jsonl"),
        (["--completion_only_loss", "false", "--dataset_text_field", "question"], 2, "every token bears loss"),
        (["--completion_only_loss", "false", "--sparsity", "rows"], 2, "every token bears loss"),
        (["--lora_dropout", "0.1", "--sparsity", "rows"], 2, "lora_dropout"),
        (["--sparsity.mlp", '{"7": 0.5}'], 2, "mlp.7: no such layer"),
        (["--lora_dropout", "0.1"], 2, "lora_dropout"),
        (["--use_dora"], 2, "DoRA"),
        (["--max_length", "999"], 1, "max_seq_length=999"),
    ],
)
def test_training_that_cannot_be(training, words, code, message, capsys):
    assert main(["train", training, *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_trl_that_needs_a_gpu_is_refused(training, monkeypatch, capsys):
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.0" if name == "trl" else true(name))
    assert main(["train", training]) == 1
    assert "cannot train without a GPU. Install an older one: `pip install 'trl<1.15'`" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_unsloth_backend_needs_a_gpu(training, capsys):
    assert main(["train", training, "--backend", "unsloth"]) == 1
    assert "backend 'unsloth' cannot run: no CUDA GPU" in capsys.readouterr().err


# -- The quickstart ---------------------------------------------------------------------------------------------------


def test_quickstart_compares_three_runs(training, tmp_path, monkeypatch, capsys):
    """The whole quickstart on the tiny model, with steps enough for every phase."""
    from sparse_unsloth.quickstart import run as quickstart

    monkeypatch.setattr(quickstart, "RECIPE", training)
    monkeypatch.setattr(quickstart, "HEAD_CHUNK", 1)
    words = yaml.safe_load(Path(training).read_text()) | {"dataset_test_size": 9, "save_strategy": "no"}
    save_recipe(Path(training), words, dataset_size=32, max_length=30)
    wall = []

    class Timed(quickstart.Turns):
        def run(self, *functions):
            began = time.perf_counter()
            super().run(*functions)
            wall.append(time.perf_counter() - began)

    monkeypatch.setattr(quickstart, "Turns", Timed)
    folder = tmp_path / "quick"
    assert main(["quickstart", "--steps", "8", "--output-dir", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    dense, sparse, equal = (results["runs"][name] for name in ("dense", "sparse", "dense, equal cost"))

    assert results["same_initial_adapter"]
    assert results["same_batches"]
    assert (dense["steps"], sparse["steps"]) == (8, 8)
    assert sparse["step_is_sparse"] == [False, True, True, *[False] * 5]
    assert dense["step_is_sparse"] == [False] * 8
    assert 1 <= equal["steps"] <= 8
    assert dense["flops_by_step"][: equal["steps"]] == equal["flops_by_step"]
    for step, is_sparse in enumerate(sparse["step_is_sparse"]):
        assert (sparse["flops_by_step"][step] < dense["flops_by_step"][step]) == is_sparse
    assert sparse["calibration_flops"] > dense["calibration_flops"] == 0
    assert results["sparse_step_flops"] < 1
    assert results["before"]["answers"] == 9
    for run in results["runs"].values():
        assert set(run["evaluation"]) == {"answer_loss", "token_accuracy", "exact_match", "answers"}

    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "results.md").read_text()
    printed = capsys.readouterr().out
    pairs = results["pairs"]
    assert sum(dense["step_seconds"] + sparse["step_seconds"]) < wall[0], "a step's time holds no waiting for the other"
    seconds = [[run["step_seconds"][step] for step in (1, 2)] for run in (dense, sparse)]
    assert pairs["speed"] == [slow / fast for slow, fast in zip(*seconds, strict=True)]  # its sparse steps
    words = ("answer loss, held out", "exact match, held out", "speed, median of pairs", "FLOPs, 10^12", "judge")
    assert "evaluating" not in printed, "a bar where there is no terminal"
    for word in words:
        assert word in table
        assert word in printed


def test_on_a_gpu_the_quickstart_compares_stock_and_auto(training, tmp_path, monkeypatch, capsys):
    """With the tiny model on the CPU in their place: what a GPU changes is the model, and what `auto` decides."""
    from sparse_unsloth.quickstart import run as quickstart

    monkeypatch.setattr(quickstart, "RECIPE", training)
    monkeypatch.setattr(quickstart, "has_gpu", lambda: True)
    keys = {"max_length": "30", "dataset_size": "32", "dataset_test_size": "9", "model_name_or_path": "of-the-hub"}
    monkeypatch.setattr(quickstart, "ON_GPU", keys)
    model = yaml.safe_load(Path(training).read_text())["model_name_or_path"]
    results = quickstart.quickstart(tmp_path / "quick", steps=3, model=model)
    assert (results["model"], results["backend"]) == (model, "PEFT")
    stock, auto = (results["runs"][name] for name in ("stock", "auto"))
    assert results["same_initial_adapter"]
    assert results["same_batches"]
    assert stock["step_is_sparse"] == [False] * 3
    assert len(results["pairs"]["speed"]) == 2
    assert results["sparsity"]["preset"] != "auto", "what was decided"
    assert "flops" not in auto
    assert stock["losses"][0] == pytest.approx(auto["losses"][0], rel=1e-5), "auto's forward is exact"
    adapters = [tmp_path / "quick" / name / "adapter" for name in ("stock", "auto")]
    assert [(adapter / CONFIG_NAME).is_file() for adapter in adapters] == [False, True], "stock is not attached"
    assert (tmp_path / "quick" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "sparse_unsloth auto" in printed
    assert "stock PEFT against auto" in " ".join(printed.split())
    assert "FLOPs, 10^12" not in printed


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_keys_on_a_gpu_make_a_recipe(has_bfloat16, monkeypatch):
    from sparse_unsloth.quickstart.run import keys_on_gpu

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)
        keys = keys_on_gpu()
    assert (keys["bf16"], keys.get("fp16", "false")) == (("true", "false") if has_bfloat16 else ("false", "true"))
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    made = load_recipe("quickstart", [*words, "--use_cpu", "true", "--bf16", "false", "--fp16", "false"])
    assert made.model.load_in_4bit
    assert made.model.dtype == ("bfloat16" if has_bfloat16 else "float16")
    assert made.data.dataset_options["needle_haystack"]["max_num_statements"] == 60
    assert (made.backend, made.training.max_length) == ("auto", 1024)


def test_evaluation_counts_answers_by_hand(training):
    """Against log-probabilities taken one sample at a time, without padding."""
    from sparse_unsloth.quickstart.run import evaluate
    from sparse_unsloth.training.run import build_trainer

    words = ["--sparsity", "dense", "--dataset_test_size", "9", "--do_eval", "--per_device_eval_batch_size", "4"]
    trainer, _ = build_trainer(load_recipe(training, words))
    found = evaluate(trainer)
    loss, hits, tokens, exact = 0.0, 0, 0, 0
    for row in trainer.eval_dataset:
        sample = trainer.data_collator([row])
        ids = sample["input_ids"][0]
        first = (sample["labels"][0] != -100).nonzero()[0].item()
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids[None]).logits[0]
        right = logits[first - 1 : -1].argmax(-1) == ids[first:]
        loss -= logits.log_softmax(-1)[range(first - 1, len(ids) - 1), ids[first:]].sum().item()
        hits, tokens, exact = hits + right.sum().item(), tokens + len(right), exact + right.all().item()
    assert found["answer_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits / tokens)
    assert found["exact_match"] == pytest.approx(exact / 9)
    assert found["answers"] == 9
    trainer.data_collator.padding_free = True  # as Unsloth sets it: a batch is one row of several documents
    assert evaluate(trainer) == found


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_quickstart_counts_a_backward_pass_through_few_rows(training, monkeypatch, checkpointing):
    """Padding is computed forward; O and MLP of the rows of the backward pass twice."""
    from sparse_unsloth import get_state
    from sparse_unsloth.quickstart import run as quickstart
    from sparse_unsloth.training.run import build_trainer

    monkeypatch.setattr(quickstart, "HEAD_CHUNK", 1)
    words = ["--sparsity", "rows", "--attn_implementation", "eager", "--gradient_checkpointing", checkpointing]
    recipe = load_recipe(training, [*words, "--loss_type", "nll"])
    trainer, _ = build_trainer(recipe)
    state = get_state(trainer.model)
    state.begin_training("test", 1)
    state.set_step(0)
    long = {"input_ids": [*range(2, 17)], "labels": [-100] * 12 + [3, 4, 1]}
    short = {"input_ids": [*range(2, 9)], "labels": [-100] * 5 + [3, 1]}
    batch = trainer.data_collator([long, short])
    log = quickstart.BatchLog([(batch["labels"], batch["attention_mask"])])
    (expected,) = quickstart.flops_by_step(recipe, trainer, log.batches())
    trainer.model.train()
    with counter() as counted:
        trainer.model(**batch).loss.backward()
    shape = quickstart.ModelShape.from_config(trainer.model.config)
    # TRL's chunked loss computes logits twice, of loss positions only; here they are computed once, of every position.
    head = 2 * shape.hidden_size * shape.vocab_size
    others = (expected - 3 * head * 5, counted.get_total_flops() - 2 * head * 30)
    # Eager attention computes the whole square, and no flash kernel's scores again.
    eager, fused = (
        quickstart.step_flops(
            shape,
            [(0.0, 0.0)] * 2,
            quickstart.TrainingStep(30, 0, [15, 15], 4, checkpointing=checkpointing == "true", attention=kind),
        ).parts.attention_core
        for kind in ("eager", "fused")
    )
    assert others[0] - fused == pytest.approx(others[1] - eager, rel=0.01)


def test_equal_cost_steps_come_nearest():
    from sparse_unsloth.quickstart.run import equal_cost_steps

    assert [equal_cost_steps([10, 10, 10], budget) for budget in (1, 14, 16, 29, 99)] == [1, 1, 2, 3, 3]
