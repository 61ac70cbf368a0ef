"""Tests `sparse-unsloth estimate`: tokens by hand, FLOPs by PyTorch's counter, advice and errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
import yaml

from sparse_unsloth.cli import main
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.forecast.estimate import estimate
from sparse_unsloth.forecast.model import WHOLE_LAYERS, has_whole_layers
from sparse_unsloth.forecast.report import as_dict, report
from sparse_unsloth.planning.fits import load
from sparse_unsloth.training.recipe import load_recipe

from flops import counter
from word_models import questions, save_checkpoint, save_rows, text

SIZES = [(3, 1), (5, 2), (2, 4), (7, 1), (4, 3)]
"""Words of question and answer. A sample has p + 2 context tokens: the last of p + 3 prompt tokens predicts."""
CONTEXT, DENSE = 21 + 5 * 2, 11 + 5 * 2
LONGEST = 7 + 1 + 4
ALWAYS = {"mlp": {"1-2": 0.75}, "self_attn": {"1": 0.5}, "start_step": 0, "end_step": 1.0, "estimator": {"kind": "svd"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(checkpoint, tmp_path):
    """Writes a recipe of five questions, one micro-batch each step."""

    def make(rows=None, **changes):
        values = {
            "model_name_or_path": checkpoint,
            "dataset_name": save_rows(tmp_path / "rows.jsonl", questions(SIZES) if rows is None else rows),
            "use_cpu": True,
            "bf16": False,
            "backend": "peft",
            "max_length": 64,
            "per_device_train_batch_size": 5,
            "lora_r": 4,
            "gradient_checkpointing": False,
            "attn_implementation": "eager",
            "output_dir": str(tmp_path / "run"),
            "sparsity": ALWAYS,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return str(path)

    return make


def of_gpu(recipe, **changes):
    """The same as it would be estimated for a GPU, with Unsloth if ``changes`` name no other backend."""
    made = load_recipe(recipe(**{"backend": "unsloth", **changes}))
    made.training.use_cpu = False
    return made


# -- Tokens by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "backend", "changes", "padding"),
    [
        ("padded", "peft", {}, 5 * LONGEST - 52),
        ("padded", "unsloth", {"padding_free": False}, 5 * LONGEST - 52),
        ("padding-free", "unsloth", {}, 0),
        ("padding-free", "peft", {"padding_free": True, "max_length": None}, 0),
        ("packed", "peft", {"packing": True, "max_length": 24}, 0),
        ("packed", "peft", {"packing": True, "packing_strategy": "wrapped", "max_length": 52}, 0),
    ],
)
def test_context_share_of_each_layout(recipe, layout, backend, changes, padding):
    made = of_gpu(recipe, **changes) if backend == "unsloth" else load_recipe(recipe(**changes))
    result = estimate(made)
    tokens = result.tokens
    assert (tokens.layout, result.backend) == (layout, backend)
    assert (tokens.context, tokens.dense, tokens.padding) == (CONTEXT, DENSE, padding)
    assert tokens.context_share == pytest.approx(31 / 52)
    assert tokens.share("padding") == pytest.approx(padding / (52 + padding))


def test_lengths_of_samples(recipe):
    tokens = estimate(load_recipe(recipe())).tokens
    assert (tokens.length.mean, tokens.length.p50, tokens.length.max) == (52 / 5, 11, LONGEST)
    assert (tokens.output.mean, tokens.output.p50, tokens.output.max) == (16 / 5, 3, 5)
    assert (tokens.samples, tokens.dropped, tokens.without_loss, tokens.micro_batches) == (5, 0, 0, 1)


def test_packed_samples_are_told_apart(recipe):
    """Three rows of at most 24 tokens hold the five samples."""
    tokens = estimate(load_recipe(recipe(packing=True, max_length=24))).tokens
    assert (tokens.length.mean, tokens.length.max) == (52 / 5, LONGEST)
    assert tokens.rows == 52


def test_several_turns_with_loss_on_the_assistant_only(recipe):
    turns = [(3, 2), (4, 1)]
    messages = [
        message
        for prompt, answer in turns
        for message in (
            {"role": "user", "content": text(prompt)},
            {"role": "assistant", "content": text(answer)},
        )
    ]
    made = load_recipe(recipe([{"messages": messages}] * 5, assistant_only_loss=True))
    tokens = estimate(made).tokens
    assert tokens.context == 5 * (3 + 2 + 4 + 2)
    assert tokens.dense == 5 * (2 + 2 + 1 + 2)


def test_loss_on_every_token_leaves_no_context(recipe):
    result = estimate(load_recipe(recipe([{"text": text(9)}] * 5)))
    assert result.tokens.context_share == 0
    assert result.dense.flops == result.sparse.flops
    assert "No token is context" in as_dict(result)["advice"][0]


def test_dense_tokens_none_makes_all_context(recipe):
    tokens = estimate(load_recipe(recipe(sparsity={**ALWAYS, "dense_tokens": "none"}))).tokens
    assert (tokens.context, tokens.dense) == (52, 0)


def test_cut_and_dropped_samples_are_counted(recipe):
    """Ten tokens: three samples are longer, and of one more the answer is beyond them."""
    result = estimate(load_recipe(recipe(max_length=10)))
    assert (result.tokens.dropped, result.tokens.truncated) == (1, 3)
    advice = " ".join(as_dict(result)["advice"])
    assert "1 of 5 samples are left out" in advice
    assert "3 of 5 samples are as long as max_length" in advice


def test_samples_that_are_looked_at(recipe):
    rows = questions(SIZES * 8)
    result = estimate(load_recipe(recipe(rows, num_train_epochs=2)), samples=10)
    assert (result.tokens.samples, result.tokens.dataset_samples, result.tokens.micro_batches) == (10, 40, 2)
    assert result.optimiser_steps == 16
    assert estimate(load_recipe(recipe(rows)), samples=None).tokens.samples == 40


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"loss_type": "nll"}, {"lora_target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("is_sparse", [False, True, "rows"])
def test_flops_of_a_step_against_the_counter(recipe, is_sparse, changes, checkpointing):
    """The real trainer's model on the real trainer's batch."""
    from sparse_unsloth import get_state
    from sparse_unsloth.training.run import build_trainer

    if "lora_target_modules" in changes and (is_sparse or checkpointing):
        pytest.skip("sparse layers need an adapter on each projection; a recompute stops before a plain down_proj")
    if "loss_type" in changes and checkpointing and is_sparse != "rows":
        pytest.skip("the loss is no part of what is computed again; without skipping unused rows it is")
    sparsity = ALWAYS if is_sparse else "dense"
    if is_sparse == "rows":
        # TRL's default loss, and the other one without skipping unused rows.
        sparsity = {"preset": "rows", "exact_removal": not changes}
    source = recipe(sparsity=sparsity, gradient_checkpointing=checkpointing, **changes)
    expected = estimate(load_recipe(source))
    trainer, _ = build_trainer(load_recipe(source))
    if is_sparse:
        get_state(trainer.model).begin_training("test", 10)
        get_state(trainer.model).set_step(0)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with counter() as counted:
        trainer.compute_loss(trainer.model, batch).backward()
    step = expected.sparse if is_sparse else expected.dense
    assert step.flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    assert expected.dense.milliseconds is None


def test_flops_add_up_over_an_optimiser_step(recipe):
    one = estimate(load_recipe(recipe()))
    four = estimate(load_recipe(recipe(gradient_accumulation_steps=4)))
    assert four.dense.flops == 4 * one.dense.flops


def test_exact_removal_and_sparsity_each_save(recipe):
    result = estimate(of_gpu(recipe, max_length=64, rows=questions([(60, 4)] * 20), per_device_train_batch_size=4))
    assert result.dense.flops > result.dense_exact.flops > result.sparse_exact.flops
    assert result.dense.flops > result.sparse.flops > result.sparse_exact.flops
    assert result.sparse_as_trained is result.sparse_exact
    off = estimate(of_gpu(recipe, sparsity={**ALWAYS, "exact_removal": False}))
    assert off.sparse_as_trained is off.sparse
    assert off.dense_as_trained is off.dense


def test_rows_of_a_backward_pass(recipe):
    """Fewer rows cost less; padding and answers cost what they did; every layer but the last takes part."""
    rows = questions([(60, 4), (30, 4)] * 10)
    results = {
        share: estimate(of_gpu(recipe, rows=rows, max_length=128, sparsity={"backward_rows": share}))
        for share in (0.1, 0.25, 0.9999)
    }
    few, quarter, every = results.values()
    assert few.sparse_exact.flops < quarter.sparse_exact.flops < every.sparse_exact.flops
    assert every.sparse_exact.flops == pytest.approx(every.dense_exact.flops)
    assert quarter.sparse.flops > quarter.sparse_exact.flops
    assert (quarter.sparse_share, quarter.backward_rows, quarter.dense_layer_0) == (1.0, 0.25, True)
    assert quarter.presets["rows"].flops_ratio == pytest.approx(quarter.flops_ratio)
    assert list(quarter.presets) == ["rows", "o1", "o2"]
    assert few.memory.peak < quarter.memory.peak < every.memory.peak
    dense = estimate(of_gpu(recipe, rows=rows, max_length=128, sparsity="dense"))
    assert quarter.memory.kept_activations == dense.memory.kept_activations, "nothing is computed twice"
    changes = {"rows": rows, "max_length": 128, "gradient_checkpointing": True}
    quarter, scheduled = (
        estimate(of_gpu(recipe, **changes, sparsity={"backward_rows": 0.25, "end_step": end})) for end in (1.0, 0.5)
    )
    assert (quarter.sparse_share, scheduled.sparse_share) == (1.0, 0.5)
    assert scheduled.memory.peak > quarter.memory.peak, "a dense phase recomputes everything"


def test_padding_is_left_out_of_a_backward_pass_through_few_rows():
    shape, dense = ModelShape(64, 128, 3, 4, 2, 16, 96), [(0.0, 0.0)] * 3
    padded, bare = (
        step_flops(shape, dense, TrainingStep(4, 20, [], 4, head_tokens=0, padding_tokens=padding, backward_rows=0.25))
        for padding in (10, 0)
    )
    assert padded.forward.total > bare.forward.total
    assert padded.recompute.total == bare.recompute.total
    assert padded.backward.mlp_base == bare.backward.mlp_base


# -- Advice and the command -------------------------------------------------------------------------------------------


def advise(result) -> str:
    return " ".join(as_dict(result)["advice"])


LONG = questions([(100, 4)] * 12)
SHORT = questions([(4, 60)] * 12)


def test_advice_where_it_is_worth_it(recipe):
    text = advise(estimate(load_recipe(recipe(LONG, max_length=128, sparsity={"mlp": {"1-2": 0.9}}))))
    assert text.startswith("94% of your tokens are context: a dense step has")
    assert "compare with a dense run that stops" in text
    assert "Not worth it" not in text


def test_advice_where_it_is_not(recipe):
    text = advise(estimate(load_recipe(recipe(SHORT, max_length=128))))
    assert text.startswith("9% of your tokens are context")
    assert "Not worth it" in text
    assert "stand in the prompt" in text


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (questions([(4, 2), (90, 2)] * 5), {}, "are padding: packing: true"),
        (LONG, {"sparsity": {"mlp": {"all": 0.5}}}, "Layer 0's MLP is sparse"),
        (LONG, {"sparsity": "dense"}, "this recipe is dense. A sparse step would give: rows about"),
        (LONG, {"sparsity": {"mlp": {"1": 0.5}, "start_step": 50, "end_step": 60}}, "the whole training will be dense"),
        (LONG, {}, "Presets on this data"),
        (LONG, {}, "For quality take `sparsity: rows` first"),
        (LONG, {"sparsity": "rows"}, "The forward pass is exact, and on five tasks"),
        (LONG, {"sparsity": "rows"}, "gradient_checkpointing: true stores far less, and costs less here"),
        (LONG, {"sparsity": {"backward_rows": 0.05}}, "Fewer than 10% of the context rows did worse"),
        (SHORT, {"sparsity": "rows"}, "Not worth it: it gains"),
        (LONG, {"sparsity": {"backward_rows": 0.2, "start_step": 50}}, "the whole training will be dense"),
    ],
)
def test_hints(recipe, rows, changes, message):
    assert message in advise(estimate(load_recipe(recipe(rows, max_length=128, **changes))))


def test_predicted_times_on_a_gpu(recipe):
    result = estimate(of_gpu(recipe, rows=LONG, max_length=128, sparsity="o2", load_in_4bit=True))
    assert result.fitted is not None
    assert result.speedup == pytest.approx(result.dense.milliseconds / result.sparse_exact.milliseconds)
    low, high = sorted((1.0, result.speedup))
    assert low <= result.whole_speedup <= high
    text = advise(result)
    assert "expect about" in text
    assert "The GPU waits for its host: `cuda_graphs: true`" in text, "a model this small is bound by the host"
    uncaptured = {"preset": "o2", "exact_removal": False}
    text = advise(estimate(of_gpu(recipe, rows=LONG, max_length=128, sparsity=uncaptured, load_in_4bit=True)))
    assert "the host's launches take longer" in text


CAPTURED = {"max_length": 128, "load_in_4bit": True, "gradient_checkpointing": True, "padding_free": False}


def test_captured_steps_do_not_wait_for_the_host(recipe):
    plain = estimate(of_gpu(recipe, rows=LONG, **CAPTURED, sparsity="rows"))
    assert plain.recorded.milliseconds < plain.sparse_exact.milliseconds
    assert plain.graphs_speedup == pytest.approx(plain.sparse_exact.milliseconds / plain.recorded.milliseconds)
    assert plain.sparse_as_trained is plain.sparse_exact
    assert f"`cuda_graphs: true` is expected to make a step {plain.graphs_speedup:.2f}x" in advise(plain)
    asked = estimate(of_gpu(recipe, rows=LONG, **CAPTURED, sparsity={"backward_rows": 0.25, "cuda_graphs": True}))
    assert asked.sparse_as_trained is asked.recorded
    assert asked.dense_as_trained is asked.dense_exact, "dense phases are not captured"
    assert asked.speedup == pytest.approx(plain.speedup * plain.graphs_speedup)
    assert asked.presets["rows"].speedup == pytest.approx(asked.speedup)
    assert "cuda_graphs" not in advise(asked)


def test_dense_training_is_captured_too(recipe, capsys):
    plain, asked = (
        estimate(of_gpu(recipe, rows=LONG, **CAPTURED, sparsity={"preset": "dense", "cuda_graphs": graphs}))
        for graphs in (False, True)
    )
    assert "with nothing left out" in advise(plain)
    assert asked.sparse is None
    assert asked.dense_as_trained is asked.recorded
    assert asked.recorded.milliseconds == plain.recorded.milliseconds < plain.dense_exact.milliseconds
    assert "dense, with cuda_graphs" in report(asked)


def test_fp8_is_estimated_where_it_is_asked_for(recipe):
    asked = {"preset": "dense", "precision": "fp8"}
    plain = estimate(of_gpu(recipe, rows=LONG, **CAPTURED, sparsity="dense"))
    asked, captured, refused = (
        estimate(of_gpu(recipe, rows=LONG, **{**CAPTURED, "sparsity": {**asked, **more}, **changes}))
        for more, changes in (({}, {}), ({"cuda_graphs": True}, {}), ({}, {"use_dora": True}))
    )
    assert (plain.fp8, refused.fp8) == (None, None)
    assert asked.dense_as_trained is asked.fp8
    assert captured.dense_as_trained is captured.recorded
    assert (asked.dense, asked.dense_exact) == (plain.dense, plain.dense_exact)
    assert asked.memory.working_set > plain.memory.working_set
    assert "precision: fp8, of products" in report(asked)
    assert "dense, products in FP8" in report(asked)
    assert "precision: fp8 is approximate" in advise(asked)
    assert "attaching will refuse this training" in advise(refused)
    assert "precision" not in advise(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"lora_target_modules": ["q_proj", "v_proj"], "sparsity": {"preset": "dense", "cuda_graphs": True}},
        {"backend": "peft"},
        {"backend": "peft", "gradient_checkpointing": False, "sparsity": {"backward_rows": 0.25, "cuda_graphs": True}},
        {"padding_free": True},
    ],
)
def test_steps_that_are_captured(recipe, changes, monkeypatch):
    """As if the measured steps had been of both backends."""
    fits = [replace(one, backend=backend) for one in load() for backend in ("unsloth", "peft")]
    monkeypatch.setattr("sparse_unsloth.forecast.estimate.load", lambda: fits)
    result = estimate(of_gpu(recipe, rows=LONG, **{**CAPTURED, "sparsity": {**ALWAYS, "cuda_graphs": True}, **changes}))
    assert (result.sparse_as_trained or result.dense_as_trained) is result.recorded is not None
    assert "cuda_graphs" not in advise(result)


def test_families_with_whole_layers(recipe):
    """On a GPU, by transformers' names; on a CPU there are none."""
    assert set(WHOLE_LAYERS["peft"]) <= set(transformers.CONFIG_MAPPING)
    of_each = {"llama": ["unsloth", "peft"], "gemma2": ["peft"], "gemma3_text": ["peft"], "cohere": []}
    for family, backends in of_each.items():
        assert [backend for backend in WHOLE_LAYERS if has_whole_layers(of_gpu(recipe), family, backend)] == backends
        assert not any(has_whole_layers(load_recipe(recipe()), family, backend) for backend in WHOLE_LAYERS)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": {**ALWAYS, "exact_removal": False, "cuda_graphs": True}},
        {"sparsity": {"preset": "dense", "cuda_graphs": True}, "use_dora": True},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_steps_that_cannot_be_captured_as_a_whole(recipe, changes):
    asked = {**CAPTURED, "sparsity": {**ALWAYS, "cuda_graphs": True}}
    assert estimate(of_gpu(recipe, rows=LONG, **asked)).recorded is not None
    result = estimate(of_gpu(recipe, rows=LONG, **{**asked, **changes}))
    assert result.recorded is None
    assert "The times are those without cuda_graphs" in advise(result)


def test_auto_is_estimated_as_it_would_decide(recipe):
    prompts = {"sparsity": "auto", "rows": questions([(40, 1)] * 5)}
    by_rows = estimate(load_recipe(recipe(**prompts)))
    assert (by_rows.auto, by_rows.backward_rows) == (True, 0.25)
    assert "auto would choose backward_rows: 0.25 and no CUDA graphs" in advise(by_rows)
    context = estimate(load_recipe(recipe(**{**prompts, "sparsity": {"preset": "auto", "precision": "fp8-context"}})))
    assert (context.backward_rows, context.precision) == (1.0, "fp8-context")
    exact = estimate(load_recipe(recipe(sparsity="auto", rows=questions([(1, 40)] * 5))))
    assert (exact.sparse, exact.backward_rows) == (None, 1.0)
    assert "auto trains exactly" in advise(exact)
    on_gpu = estimate(of_gpu(recipe, sparsity="auto", rows=LONG, **CAPTURED))
    assert (on_gpu.cuda_graphs, on_gpu.dense_as_trained) == (True, on_gpu.recorded)


def test_command_prints_text_and_json(recipe, capsys):
    source = recipe()
    assert main(["estimate", source]) == 0
    printed = capsys.readouterr().out
    for part in ("context share", "59.6%", "One optimiser step", "GiB at the peak", "Advice"):
        assert part in printed
    assert main(["estimate", source, "--json", "--per_device_train_batch_size", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"]["context_share"] == pytest.approx(31 / 52)
    assert figures["tokens"]["micro_batches"] == 5
    assert figures["sparse"]["flops"] < figures["dense"]["flops"]
    assert figures["memory"]["peak"] > 0
    assert figures["advice"]


def test_command_says_that_the_backward_pass_goes_through_few_rows(recipe, capsys):
    assert main(["estimate", recipe(), "--preset", "rows"]) == 0
    assert "exact forward; backward through 0.25 of the context rows" in capsys.readouterr().out


def test_command_with_model_and_data_set(recipe, checkpoint, capsys):
    rows = yaml.safe_load(Path(recipe()).read_text())["dataset_name"]
    words = ["estimate", checkpoint, rows, "--preset", "o2", "--max_length", "64", "--json"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["backend"] == "unsloth", "a GPU is what it would be trained on"
    assert figures["tokens"]["layout"] == "padding-free"
    assert figures["tokens"]["context"] == CONTEXT
    assert figures["model"]["layers"][1][0] == 0.99
    assert figures["speedup"] > 0
    assert main([*words, "--use_cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "peft"


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (questions([(30, 1)] * 5), {"max_length": 16}, "none of 5 samples has a loss token"),
        (
            [{"messages": [{"role": "user", "content": "one"}]}] * 5,
            {"assistant_only_loss": True},
            r"no training samples are left.*\(5 without an answer\)",
        ),
        ([{"text": "one two"}] * 5, {"assistant_only_loss": True}, "TRL cannot prepare this data set"),
        (None, {"sparsity": {"mlp": {"1-9": 0.5}}}, r"mlp.*1-9"),
        (None, {"lora_dropout": 0.1}, "lora_dropout=0.1"),
        (None, {"lora_dropout": 0.1, "sparsity": "rows"}, "drops out 0.1 of its inputs"),
        (None, {"lora_target_modules": ["query"]}, "not found in the base model"),
        (None, {"max_length": 4096}, "beyond the 128 positions"),
        (None, {"model_name_or_path": "nobody/nothing"}, "no weights are needed"),
        (None, {"dataset_name": "nobody/nothing"}, "cannot be loaded from the Hugging Face hub"),
        (None, {"dataset_name": "missing.jsonl"}, "there is no file missing.jsonl"),
        (None, {"padding_free": True}, "max_length"),
    ],
)
def test_errors(recipe, rows, changes, message):
    source = recipe(rows, **changes)
    with pytest.raises(SparsityError, match=message):
        estimate(load_recipe(source))


def test_empty_data_set(recipe, tmp_path):
    for name, content in (("heading.csv", "question,answer\n"), ("nothing.jsonl", ""), ("damaged.jsonl", '{"a": ')):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(SparsityError, match=f"{name} is empty, or cannot be read"):
            estimate(load_recipe(recipe(dataset_name=str(file))))


def test_family_without_a_fast_path(recipe, tmp_path):
    granite = save_checkpoint(tmp_path / "granite", family="Granite")
    found = [estimate(load_recipe(recipe(model_name_or_path=granite, backend=name))) for name in ("unsloth", "peft")]
    assert [one.backend for one in found] == ["peft", "peft"]
    assert found[0].backend_reason == "whose layers run on Unsloth's compiled path, which granite takes"
    assert found[0].sparse.flops == found[1].sparse.flops > 0


def test_unknown_device(recipe):
    with pytest.raises(SparsityError, match="no steps were measured on such a GPU"):
        estimate(of_gpu(recipe), device="abacus")


def test_weights_are_not_read(recipe, checkpoint, tmp_path):
    """Only the configuration and the tokenizer are there."""
    for file in Path(checkpoint).iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert estimate(load_recipe(recipe(model_name_or_path=str(tmp_path)))).model.linear > 0
