"""`calibrate`: measurements compared with plain training forwards, allocation with brute force."""

import itertools
import json
import math
import random

import pytest
import torch
import yaml

from sparse_unsloth import SparsityConfig, attach, calibrate, detach, get_state
from sparse_unsloth.autosparsity import search
from sparse_unsloth.autosparsity.allocation import Option, allocate
from sparse_unsloth.autosparsity.budget import DataShape, frozen_share, part_cost
from sparse_unsloth.autosparsity.curves import Curves, smooth
from sparse_unsloth.autosparsity.journal import Journal, journal_key
from sparse_unsloth.autosparsity.probe import LossProbe, attached, prepare_batches, with_sparsity
from sparse_unsloth.autosparsity.report import markdown, save
from sparse_unsloth.cli import main
from sparse_unsloth.cli.calibrate import divide
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.errors import AttachError, CalibrationError, ConfigError, EstimatorError

from tiny_models import always, make_base, make_batch, make_lora, pack_nf4

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
CONFIG = {"estimator": {"rank": 4}}
SHAPE = ModelShape(64, 128, 3, 4, 2, 16, 96)


def batches(count=4, **changes):
    return [make_batch(seed, **changes) for seed in range(count)]


def run(model=None, samples=None, **changes):
    options = {"config": CONFIG, "progress": False, **changes}
    return calibrate(make_lora() if model is None else model, batches() if samples is None else samples, **options)


# -- Measuring --------------------------------------------------------------------------------------------------------


def masked_loss(model, batch, recipe, config):
    """The loss of a training forward under ``recipe``, through `attach`, and the number of positions."""
    attach(model, config.model_copy(update={"mlp": {}, "self_attn": {}} | rules(recipe)))
    with torch.no_grad():
        loss = model(**batch).loss.item()
    detach(model)
    return loss


def rules(recipe):
    return {
        part: {str(index): getattr(sparsity, part) for index, sparsity in enumerate(recipe)}
        for part in ("mlp", "self_attn")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_training_forward(family):
    model, batch = make_lora(family), make_batch(0, "left" if family == "llama" else "right")
    config = SparsityConfig(**always(estimator={"kind": "svd", "rank": 8}))
    recipe = (LayerSparsity(0.0, 0.5), LayerSparsity(0.75, 0.0), LayerSparsity(0.5, 0.25))
    changed = with_sparsity(recipe, [(1, "mlp")], 0.9)
    expected = [masked_loss(model, batch, one, config) for one in (recipe, changed)]
    with attached(model, config) as state:
        prepared = prepare_batches([batch], torch.device("cpu"), config)
        probe = LossProbe(state, state.estimator, Journal(None, ""), progress=False)
        found = probe.measure([recipe, changed], prepared, "", reference=recipe)
        (dense,) = probe.measure([probe.dense], prepared, "")
    assert [measured.loss for measured in found] == pytest.approx(expected, rel=1e-5)
    assert dense.divergence == pytest.approx(0, abs=1e-6)
    assert found[0].divergence > 0


def test_the_layers_below_a_change_do_not_run_again(monkeypatch):
    model = make_lora()
    config = SparsityConfig(**always())
    ran = []
    for index, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.gate_proj.register_forward_hook(lambda *_, index=index: ran.append(index))
    with attached(model, config) as state:
        prepared = prepare_batches(batches(1), torch.device("cpu"), config)
        probe = LossProbe(state, state.estimator, Journal(None, ""), progress=False)
        changed = with_sparsity(probe.dense, [(2, "self_attn")], 0.5)
        ran.clear()
        (found,) = probe.measure([changed], prepared, "")
        assert ran == [0, 1, 2, 2]  # the dense model, the change
        probe._journal = Journal(None, "")
        (whole,) = probe.measure([changed], prepared, "", reference=(LayerSparsity(0.5, 0.5),) * 3)
        assert ran == [0, 1, 2, 2] + [0, 1, 2] * 2  # a sparse MLP does not call its projections
    assert found == pytest.approx(whole, rel=1e-6)
    assert all("forward" not in layer.__dict__ for layer in model.base_model.model.model.layers)


def test_dropout_and_gradients_stay_off():
    model = make_lora("llama", attention_dropout=0.5)
    config = SparsityConfig(**always())
    with attached(model, config) as state:
        prepared = prepare_batches(batches(1), torch.device("cpu"), config)
        probe = LossProbe(state, state.estimator, Journal(None, ""), progress=False)
        recipe = (LayerSparsity(0.5, 0.5),) * 3
        before = torch.get_rng_state()
        first = probe.measure([recipe], prepared, "")
        probe._journal = Journal(None, "")
        assert probe.measure([recipe], prepared, "") == first
        assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# -- Curves and allocation --------------------------------------------------------------------------------------------


def test_curves_start_at_zero_and_never_fall():
    assert smooth({0.5: -0.1, 0.9: 0.3, 0.75: 0.5}) == pytest.approx({0.5: 0, 0.75: 0.4, 0.9: 0.4})
    alone = {(0, "mlp"): {0.5: 1.0}, (1, "mlp"): {0.5: 0.0}, (2, "mlp"): {0.5: 0.1}, (0, "self_attn"): {0.25: 7.0}}
    curves = Curves.fit(alone)
    assert curves.increase((1, "mlp"), 0.5) == pytest.approx(0.2 * 0.1)
    assert curves.increase((0, "mlp"), 0.5) == pytest.approx(0.8 + 0.02)
    assert curves.increase((0, "mlp"), 0.0) == 0
    assert curves.total({(0, "self_attn"): 0.25, (2, "mlp"): 0.5}) == pytest.approx(7.1)
    # Two groups of one kind, each three times as costly beside the other; dense attention has the overall factor.
    chosen = {(0, "mlp"): 0.5, (1, "mlp"): 0.5, (2, "mlp"): 0.5, (0, "self_attn"): 0.0}
    curves.rescale(chosen, [[(0, "mlp")], [(1, "mlp"), (2, "mlp")]], [3 * 0.82, 3 * 0.12])
    assert curves.total(chosen) == pytest.approx(3 * 0.94)
    assert curves.increase((0, "self_attn"), 0.25) == pytest.approx(3 * 7)
    curves.rescale(chosen, [[(0, "mlp")], [(1, "mlp"), (2, "mlp")]], [0.94, -0.1])  # noise below zero is zero
    assert curves.increase((0, "mlp"), 0.5) > 0.82
    assert 0 < curves.increase((2, "mlp"), 0.5) < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_of_all(seed):
    rng = random.Random(seed)
    levels = (0.0, 0.5, 0.9)
    options = {
        part: [Option(level, 10 ** rng.uniform(-5, 0) * bool(level), (1 - level) * cost) for level in levels]
        for part, cost in ((part, rng.uniform(0.01, 0.1)) for part in range(7))
    }
    every = list(itertools.product(*options.values()))

    def total(choice, what):
        return sum(getattr(option, what) for option in choice)

    whole = sum(choices[0].flops for choices in options.values())
    found = allocate(options, flops=0.5 * whole)
    mine = [next(o for o in options[part] if o.sparsity == sparsity) for part, sparsity in found.items()]
    best = min(total(choice, "loss") for choice in every if total(choice, "flops") <= 0.5 * whole)
    assert total(mine, "flops") <= 0.5 * whole * (1 + 1e-6)
    assert total(mine, "loss") == pytest.approx(best, rel=1e-4)
    found = allocate(options, loss=0.05)
    mine = [next(o for o in options[part] if o.sparsity == sparsity) for part, sparsity in found.items()]
    best = min(total(choice, "flops") for choice in every if total(choice, "loss") <= 0.05)
    assert total(mine, "loss") <= 0.05 * (1 + 1e-6)
    assert total(mine, "flops") == pytest.approx(best, rel=1e-4)
    with pytest.raises(CalibrationError, match="the least possible is"):
        allocate(options, flops=0.05 * whole)


def test_parts_add_up_to_the_recipe_and_the_step():
    recipe = [LayerSparsity(0.5, 0.0), LayerSparsity(0.9, 0.75), LayerSparsity(0.0, 0.25)]
    parts = sum(part_cost(SHAPE, part, getattr(s, part), 4) for s in recipe for part in ("mlp", "self_attn"))
    assert parts == pytest.approx(frozen_share(SHAPE, recipe, 4))
    assert sum(part_cost(SHAPE, part, 0.0) for part in ("mlp", "self_attn")) * 3 == pytest.approx(1)
    prepared = prepare_batches(batches(2), torch.device("cpu"), SparsityConfig())
    data = DataShape.of(prepared)
    assert data.row_lengths == (13, 11, 9) * 2
    assert (data.context_tokens, data.loss_tokens) == (36, 24)  # prompts less their last token
    dense = [(0.0, 0.0)] * 3
    expected = [
        step_flops(
            SHAPE, layers, TrainingStep(data.dense_tokens, 36, [13, 11, 9] * 2, 4, head_tokens=24, estimator_rank=rank)
        ).total
        for layers, rank in ((recipe, 4), (dense, 0))
    ]
    assert data.step_ratio(SHAPE, recipe, 4, 4) == expected[0] / expected[1]


# -- The whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2"])
def test_families_never_seen_complete_and_attach(family, tmp_path):
    model = make_lora(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = run(model, held_out=batches(2), budget=0.5)
    assert get_state(model) is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert result.chosen.share <= 0.5
    assert math.isfinite(result.chosen.predicted + result.held_out["calibrated"].increase)
    save(result, tmp_path)
    report = attach(model, tmp_path / "sparsity.yaml")
    assert report.num_sparse
    assert get_state(model).selector is not None, "the estimator beside the recipe was not loaded"
    for name, factors in get_state(model).estimator.layers.items():
        assert factors.gain.keys() == result.estimator.layers[name].gain.keys()


@pytest.mark.parametrize("weights", ["bfloat16", "nf4"])
def test_weights_of_16_and_4_bits_calibrate(weights):
    base = make_base("llama", dtype=torch.bfloat16) if weights == "bfloat16" else pack_nf4(make_base("llama"))
    model = make_lora(base=base)
    result = run(model, budget=0.5)
    assert result.chosen.divergence > 0
    attach(model, result.config.model_copy(update={"start_step": 0, "end_step": 1.0}), batches())
    model(**make_batch(0)).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_loss_bound_is_kept_and_more_of_it_saves_more():
    shares = []
    for max_loss in (0.001, 0.02):
        result = run(make_lora(lora_b=0.5, seed=3), max_loss=max_loss, mlp_levels=(0.25, 0.5, 0.9))
        assert max(result.chosen.measured, result.chosen.divergence) <= max_loss
        shares.append(result.chosen.share)
    assert shares[1] <= shares[0] < 1


def test_a_base_that_leaves_out_rows_is_calibrated_for_channels():
    config = run(config={**CONFIG, "preset": "rows", "seed": 5}).config
    assert (config.backward_rows, config.preset, config.seed) == (1.0, None, 5)
    assert (config.start_step, config.end_step) == (0.05, 0.75), "the schedule of rows is not one of channels"
    attach(make_lora(), config.model_copy(update={"estimator": SparsityConfig(estimator={"kind": "svd"}).estimator}))
    asked = SparsityConfig(preset="rows", start_step=0.5).whole_rows()
    assert (asked.start_step, asked.end_step) == (0.5, 1.0)


def test_criteria_without_estimator_calibrate_too():
    result = run(config={"criterion": "magnitude"}, budget=0.6)
    assert result.estimator is None
    assert result.config.criterion == "magnitude"


def test_when_the_whole_costs_more_than_its_parts_the_parts_are_measured_together(monkeypatch):
    """Joint losses are multiplied by ten; the second prediction is then right."""
    original = LossProbe.measure

    def dearer(self, recipes, prepared, title, reference=None):
        found = original(self, recipes, prepared, title, reference)
        if title.startswith("All together"):
            (dense,) = original(self, [self.dense], prepared, title)
            found = [found[0]._replace(loss=dense.loss + 1.0, divergence=1.0)]
        return found

    monkeypatch.setattr(LossProbe, "measure", dearer)
    result = run(budget=0.5)
    assert not result.rounds[0].foretold
    assert not result.rounds[0].corrected
    assert "cost more than alone" in markdown(result)
    for outcome in result.rounds[1:]:
        assert outcome.corrected
        assert outcome.predicted == pytest.approx(1.0, abs=0.5)


def test_same_seed_same_recipe_and_a_second_start_measures_nothing(tmp_path, monkeypatch):
    first = run(output_dir=tmp_path, budget=0.5)
    assert run(budget=0.5).chosen == first.chosen

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(LossProbe, "_forward", refuse)
    assert run(output_dir=tmp_path, budget=0.5).chosen == first.chosen


def test_an_interrupted_calibration_goes_on(tmp_path, monkeypatch):
    whole = run(budget=0.5)
    count = 0
    original = LossProbe._forward

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count == 15:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(LossProbe, "_forward", interrupted)
    model = make_lora()
    with pytest.raises(KeyboardInterrupt):
        run(model, output_dir=tmp_path, budget=0.5)
    assert get_state(model) is None
    assert model.training
    journal = tmp_path / search.JOURNAL_FILE
    written = len(journal.read_text().splitlines())
    assert written > 8
    journal.write_text(journal.read_text() + '["cut o')  # the power went while a line was written
    count = -(10**6)
    assert run(output_dir=tmp_path, budget=0.5).chosen == whole.chosen
    again = count + 10**6
    key = json.loads(journal.read_text().splitlines()[0])
    count = -(10**6)
    run(budget=0.5)
    assert again < count + 10**6 - 5
    run(output_dir=tmp_path, budget=0.5, mlp_levels=(0.5, 0.9))
    assert json.loads(journal.read_text().splitlines()[0]) != key


def test_the_key_tells_models_data_and_settings_apart():
    from sparse_unsloth.model.decoder_layer import find_layers

    def key(model, data, **settings):
        return journal_key(model, find_layers(model), data, settings)

    model = make_lora()
    keys = {
        key(model, batches(), a=1),
        key(model, batches(), a=2),
        key(model, batches(3), a=1),
        key(make_lora(seed=1), batches(), a=1),
        key(make_lora(lora_b=0.1), batches(), a=1),
    }
    assert len(keys) == 5
    assert key(make_lora(), batches(), a=1) in keys


def test_report_and_recipe_in_files(tmp_path):
    result = run(budget=0.5, held_out=batches(2))
    saved = save(result, tmp_path, "my.jsonl")
    read = SparsityConfig.from_file(tmp_path / "sparsity.yaml")
    assert read.mlp == saved.mlp
    assert read.estimator.path == str(tmp_path / "estimator.safetensors")
    assert yaml.safe_load((tmp_path / "sparsity.yaml").read_text())["estimator"]["path"] == "estimator.safetensors"
    text = (tmp_path / "report.md").read_text()
    assert "my.jsonl" in text
    assert "| o2 |" in text
    assert text.count("\n| ") >= 3 + len(result.rounds)
    data = json.loads((tmp_path / "report.json").read_text())
    assert len(data["alone"]) == 3 * 7
    assert data["speedup"] == pytest.approx(1 / data["step_flops"])
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000


def test_calibrated_calibrates_in_get_peft_model(capsys):
    from sparse_unsloth import FastSparseLanguageModel

    options = {"r": 4, "use_gradient_checkpointing": False}
    model = FastSparseLanguageModel.get_peft_model(
        make_base("qwen3"), sparsity="calibrated", calibration_samples=batches(), **options
    )
    state = get_state(model)
    assert any(map(any, state.layer_sparsity))
    assert state.selector is not None
    assert "of their dense frozen-weight matmuls" in capsys.readouterr().out
    with pytest.raises(CalibrationError, match="needs calibration_samples"):
        FastSparseLanguageModel.get_peft_model(make_base(), sparsity="calibrated", **options)
    with pytest.raises(ConfigError, match=r"'auto' was renamed: .* Set sparsity='calibrated'"):
        FastSparseLanguageModel.get_peft_model(make_base(), calibration_samples=batches(), **options)


# -- Bad input --------------------------------------------------------------------------------------------------------


def without_loss(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def without_context(batch):
    return {**batch, "labels": batch["input_ids"].clone()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": []}, CalibrationError, "data set is empty"),
        ({"probe_samples": []}, CalibrationError, "data set is empty"),
        ({"samples": [without_loss(b) for b in batches()]}, CalibrationError, "has a loss position"),
        ({"samples": [without_context(b) for b in batches()]}, CalibrationError, "context token"),
        ({"probe_samples": [{"input_ids": torch.ones(1, 4).long()}]}, CalibrationError, "has no labels"),
        ({"budget": 0.01}, CalibrationError, "cannot be reached.*Ask for at least 0.1"),
        ({"budget": 1.5}, CalibrationError, "between 0 and 1"),
        ({"max_loss": 0.0}, CalibrationError, "must be above 0"),
        ({"max_loss": 1e-12}, CalibrationError, "no recipe was found"),
        ({"budget": 0.5, "max_loss": 0.1}, CalibrationError, "both given"),
        ({"mlp_levels": (1.0,)}, CalibrationError, "mlp_levels"),
        ({"mlp_levels": (), "attention_levels": ()}, CalibrationError, "nothing could be made sparse"),
        ({"config": {"estimator": {"rank": 33}}}, EstimatorError, "rank"),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    model = make_lora(lora_b=0.5)
    with pytest.raises(error, match=message):
        run(model, **changes)
    assert get_state(model) is None


def test_a_model_that_does_not_fit_is_refused():
    model = make_lora()
    model.base_model.model.model.layers[1].mlp.gate_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)
    with pytest.raises(AttachError, match="has lora_dropout"):
        run(model)
    model = make_lora()
    attach(model, always())
    with pytest.raises(CalibrationError, match="attached already"):
        run(model)


def test_few_samples_are_divided_in_proportion():
    assert [len(group) for group in divide(range(64), (32, 16, 16))] == [32, 16, 16]
    assert [len(group) for group in divide(range(32), (32, 16, 16))] == [16, 8, 8]
    assert [len(group) for group in divide(range(2), (32, 16, 16))] == [1, 1, 0]
    with pytest.raises(CalibrationError, match="has 1 samples"):
        divide([1], (32, 16, 16))


# -- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate"], "takes RECIPE, or MODEL and DATASET"),
        (["calibrate", "a", "b", "c"], "takes RECIPE"),
        (["calibrate", "no-such-recipe"], "no shipped recipe"),
        (["calibrate", "quickstart", "--samples", "0"], "--samples: must be an integer from 1 on"),
        (["calibrate", "quickstart", "--sparsity.mlp", "3"], "mlp"),
    ],
)
def test_wrong_words(words, message, capsys):
    try:
        code = main(words)
    except SystemExit as end:  # argparse's own refusals
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_command_from_end_to_end(tmp_path, capsys):
    from word_models import save_checkpoint

    checkpoint = tmp_path / "model"
    save_checkpoint(checkpoint, "Qwen3")
    rows = [{"question": "one two three four five", "answer": f"{word} nine"} for word in ("six", "seven", "eight")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    out = tmp_path / "out"
    words = ["calibrate", str(checkpoint), str(data), "--budget", "0.6", "--output-dir", str(out)]
    keys = ["--use_cpu", "true", "--bf16", "false", "--max_length", "64", "--sparsity.estimator.rank", "4"]
    assert main([*words, *keys]) == 0
    assert "sparsity.yaml" in capsys.readouterr().out
    assert SparsityConfig.from_file(out / "sparsity.yaml").estimator.rank == 4
    assert {file.name for file in out.iterdir()} >= {
        "report.md",
        "report.json",
        "sensitivity.png",
        "measurements.jsonl",
    }


# -- A real model -----------------------------------------------------------------------------------------------------


LAYERS = 10
SHORT_TASKS = "reasoning-gym:word_sequence_reversal,family_relationships"


@pytest.mark.slow
def test_a_calibrated_recipe_beats_the_preset_at_its_flops_on_a_real_model(tmp_path, capsys):
    """The first third of SmolLM2-135M, two of the quickstart's tasks, held-out prompts.

    The whole model: benchmarks/results/calibrate.
    """
    pytest.importorskip("reasoning_gym")
    import transformers

    from sparse_unsloth.autosparsity.report import summary
    from sparse_unsloth.cli.calibrate import calibrate_recipe
    from sparse_unsloth.data.smollm2 import smollm2_checkpoint
    from sparse_unsloth.errors import DataError
    from sparse_unsloth.training.recipe import load_recipe

    try:
        checkpoint = smollm2_checkpoint()
    except DataError as error:
        pytest.skip(str(error))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, num_hidden_layers=LAYERS)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    shape = ModelShape(576, 1536, LAYERS, 9, 3, 64, 49152)
    budget = frozen_share(shape, SparsityConfig(preset="o2").layer_sparsity(LAYERS), 8)
    words = {"output_dir": str(tmp_path / "trainer"), "dataset_size": "48", "dataset_name": SHORT_TASKS}
    words["model_name_or_path"] = str(tmp_path / "model")
    words["dataset_options"] = '{"word_sequence_reversal": {"min_words": 3, "max_words": 6}}'
    recipe = load_recipe("quickstart", [word for key, value in words.items() for word in (f"--{key}", value)])
    levels = {"mlp_levels": (0.97,), "attention_levels": (0.75,)}
    result = calibrate_recipe(recipe, tmp_path, (16, 4, 8), {"budget": budget}, **levels)
    with capsys.disabled():
        print("", *summary(result), sep="\n")
    costs = [result.alone[index, "mlp"][0.97].divergence for index in range(LAYERS)]
    assert costs[0] > sum(costs[1:])
    calibrated, preset = result.held_out["calibrated"], result.held_out["o2"]
    assert calibrated.share <= preset.share
    assert calibrated.increase < 0.9 * preset.increase
    assert calibrated.divergence < 0.9 * preset.divergence
    assert result.chosen.predicted == pytest.approx(result.chosen.divergence, rel=0.25)
