"""The studies: what they compute against independent ways to compute it, and each command from end to end, offline."""

import csv
import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file

from sparse_unsloth.cli import main
from sparse_unsloth.reporting.paired_tests import compare_methods, compare_paired
from sparse_unsloth.reporting.tables import StudyError, aggregate
from sparse_unsloth.study.approximation import (
    LOW_RANK,
    MAGNITUDE,
    Decomposition,
    low_rank_loss,
    magnitude_loss,
    spectral_norm,
)
from sparse_unsloth.study.checkpoint import linear_layers
from sparse_unsloth.study.components import component_scores, keep_components, lora_pairs
from sparse_unsloth.study.whitening import input_moments, whiten


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    return Decomposition.of(torch.randn(24, 16, dtype=torch.float64))


# -- Approximations ---------------------------------------------------------------------------------------------------


def test_best_approximation_is_the_truncated_svd(known):
    left, values, right = torch.linalg.svd(known.matrix, full_matrices=False)
    residual = known.matrix - left[:, :5] * values[:5] @ right[:5]
    loss = low_rank_loss("svd_topk", known, 5, seeded())
    assert loss.frobenius == pytest.approx((residual.norm() / known.matrix.norm()).item())
    assert loss.spectral == pytest.approx((values[5] / values[0]).item())
    assert loss.parameters == 5 * (24 + 16)


@pytest.mark.parametrize("method", LOW_RANK)
def test_full_rank_loses_nothing_but_for_random_factors(known, method):
    loss = low_rank_loss(method, known, 16, seeded())
    assert (loss.frobenius < 1e-7) == (method != "random_factors")


def test_random_factors_take_the_best_scalar(known):
    generator = seeded(4)
    product = torch.randn(24, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 16, generator=generator, dtype=torch.float64
    )
    errors = [(known.matrix - scalar * product).norm().item() for scalar in torch.linspace(-1, 1, 2001).tolist()]
    found = low_rank_loss("random_factors", known, 3, seeded(4)).frobenius * known.matrix.norm().item()
    assert found == pytest.approx(min(errors), rel=1e-5)


def test_columns_of_leverage_are_found():
    """A matrix whose energy is in two columns: these have all the leverage of its top subspace."""
    matrix = 1e-3 * torch.randn(20, 12, generator=seeded(), dtype=torch.float64)
    matrix[:, [3, 8]] += torch.randn(20, 2, generator=seeded(1), dtype=torch.float64)
    planted = Decomposition.of(matrix)
    assert low_rank_loss("leverage_columns", planted, 2, seeded()).frobenius < 0.01
    assert low_rank_loss("random_columns", planted, 2, seeded()).frobenius > 0.3


@pytest.mark.parametrize("method", MAGNITUDE)
def test_magnitude_against_sorting(known, method):
    squares = known.matrix.square()
    if method != "magnitude":
        squares = squares.sum({"magnitude_rows": 1, "magnitude_columns": 0}[method])
    kept = round(0.25 * squares.numel())
    left_out = squares.flatten().sort().values[:-kept].sum()
    loss = magnitude_loss(method, known, 0.25)
    assert loss.frobenius == pytest.approx((left_out / known.matrix.square().sum()).sqrt().item())
    assert loss.parameters == 96


@pytest.mark.parametrize("shape", [(60, 40), (5, 70), (64, 1)])
def test_spectral_norm(shape):
    matrix = torch.randn(shape, generator=seeded())
    exact = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert exact * 0.998 < spectral_norm(matrix) <= exact * (1 + 1e-5)


def test_spectral_norm_of_nothing():
    assert spectral_norm(torch.zeros(4, 6)) == 0


@pytest.mark.parametrize(("method", "rank"), [("svd_topk", 0), ("svd_topk", 17), ("best", 3)])
def test_wrong_approximation(known, method, rank):
    with pytest.raises(ValueError, match=r"rank is|method is"):
        low_rank_loss(method, known, rank, seeded())


# -- Statistics -------------------------------------------------------------------------------------------------------


def test_paired_t_by_hand():
    outcome = compare_paired([3.0, 5.0, 4.0, 8.0], [1.0, 4.0, 4.0, 5.0])
    # Differences 2, 1, 0, 3: mean 1.5, standard deviation sqrt(5/3), t = d sqrt(4) with 3 degrees of freedom, whose
    # distribution has a closed form.
    assert outcome["mean_difference"] == 1.5
    assert outcome["effect_size"] == pytest.approx(1.5 / math.sqrt(5 / 3))
    assert outcome["statistic"] == pytest.approx(2 * 1.5 / math.sqrt(5 / 3))
    x = outcome["statistic"] / math.sqrt(3)
    assert outcome["p_value"] == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))


def test_wilcoxon_by_hand():
    outcome = compare_paired([3.0, 1.0, 6.0, 9.0, 12.0], [1.0, 2.0, 3.0, 4.0, 5.0], "wilcoxon")
    # Differences 2, -1, 3, 5, 7: one negative, of rank 1; two-sided, 4 of the 32 sign patterns are as extreme.
    assert outcome["p_value"] == pytest.approx(4 / 32)
    assert outcome["effect_size"] == pytest.approx(13 / 15)


def test_pairs_without_spread():
    assert compare_paired([1.0, 2.0], [1.0, 2.0])["p_value"] == 1
    constant = compare_paired([1.0, 2.0], [0.0, 1.0])
    assert (constant["p_value"], constant["effect_size"]) == (0.0, math.inf)


def test_pairs_are_matched_by_trial_and_p_values_corrected():
    rows = [
        {"method": method, "trial": trial, "value": trial + offset + random.Random(f"{method}{trial}").random() / 10}
        for method, offset in (("a", 0), ("b", 0.2), ("c", 0.21))
        for trial in random.Random(method).sample(range(6), 6)
    ]
    tests = {(row["first"], row["second"]): row for row in compare_methods(rows, [], "trial", "value")}
    assert tests["a", "b"]["mean_difference"] == pytest.approx(-0.2, abs=0.06)
    plain = sorted(row["p_value"] for row in tests.values())
    corrected = sorted(row["p_holm"] for row in tests.values())
    assert corrected[0] == pytest.approx(3 * plain[0])
    assert corrected[2] == pytest.approx(max(plain[2], 2 * plain[1], 3 * plain[0]))


def test_too_few_pairs_and_unknown_tests():
    with pytest.raises(StudyError, match="two or more pairs"):
        compare_paired([1.0], [2.0])
    with pytest.raises(StudyError, match="must be one of t, wilcoxon"):
        compare_paired([1.0, 2.0], [2.0, 1.0], "z")


def test_aggregate():
    rows = [{"method": "a", "x": 1.0}, {"method": "b", "x": 5.0}, {"method": "a", "x": 3.0}]
    assert aggregate(rows, ["method"], ["x"]) == [
        {"method": "a", "n": 2, "x_mean": 2.0, "x_std": pytest.approx(math.sqrt(2))},
        {"method": "b", "n": 1, "x_mean": 5.0, "x_std": 0.0},
    ]


# -- toy --------------------------------------------------------------------------------------------------------------


def test_toy_ranks_the_methods(tmp_path, capsys):
    words = f"study toy --n 40 --m 30 --ranks 2 8 20 --trials 6 --seed 3 --outdir {tmp_path}"
    assert main(words.split()) == 0
    assert "toy.png, toy_summary.csv, toy_tests.csv, toy_trials.csv" in capsys.readouterr().out
    trials = rows_of(tmp_path / "toy_trials.csv")
    assert len(trials) == 2 * 3 * 5 * 6
    error = {(row["matrix"], row["rank"], row["trial"], row["method"]): float(row["frobenius"]) for row in trials}
    for matrix, rank, trial in {key[:3] for key in error}:
        best, subspace, factors = (
            error[matrix, rank, trial, method] for method in ("svd_topk", "random_subspace", "random_factors")
        )
        assert best < subspace < factors
        assert best <= error[matrix, rank, trial, "leverage_columns"]
        assert best <= error[matrix, rank, trial, "random_columns"]
    summary = rows_of(tmp_path / "toy_summary.csv")
    assert {row["n"] for row in summary} == {"6"}
    tests = rows_of(tmp_path / "toy_tests.csv")
    assert len(tests) == 2 * 3 * 10
    assert all(0 <= float(row["p_value"]) <= float(row["p_holm"]) <= 1 for row in tests)
    assert is_picture(tmp_path / "toy.png")


def test_toy_is_repeatable(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        words = f"study toy --n 12 --m 12 --ranks 3 --trials 2 --seed {seed} --outdir {tmp_path / name}"
        assert main(words.split()) == 0
    first, same, other = ((tmp_path / name / "toy_trials.csv").read_text() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize("words", ["--ranks 97", "--ranks 0", "--trials 1", "--n 0"])
def test_toy_that_cannot_be(tmp_path, words, capsys):
    assert main(["study", "toy", *words.split(), "--outdir", str(tmp_path)]) == 2
    assert "toy: needs n, m >= 1" in capsys.readouterr().err


# -- spectra ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Llama with a tokenizer of whole words, in two safetensors files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<pad>", "a", "the", "film", "is", "was", "good", "fine", "bad", "dull", "very", "not"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_layers_are_listed_from_headers_in_order(checkpoint):
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    layers = linear_layers(checkpoint)
    assert len(layers) == 2 * 7 + 1
    assert not any("embed" in layer.name or "norm" in layer.name for layer in layers)
    shapes = {layer.name: layer.shape for layer in layers}
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 48)
    for layer in layers:
        assert tuple(layer.load().shape) == layer.shape


def test_layer_two_comes_before_layer_ten(tmp_path):
    tensors = {f"h.{index}.fc.weight": torch.ones(2, 3) for index in (10, 2, 1)} | {"wte.weight": torch.ones(9, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert [layer.name for layer in linear_layers(tmp_path)] == ["h.1.fc", "h.2.fc", "h.10.fc"]


def test_spectra_of_a_model(checkpoint, tmp_path):
    words = f"study spectra --model {checkpoint} --ranks 1 4 32 --keep-ratio 0.25 --outdir {tmp_path}"
    assert main(words.split()) == 0
    table = {row["layer"]: row for row in rows_of(tmp_path / "spectra_layers.csv")}
    assert len(table) == 15
    for layer in linear_layers(checkpoint):
        values = torch.linalg.svdvals(layer.load().double())
        row = table[layer.name]
        assert float(row["largest"]) == pytest.approx(values[0].item(), rel=1e-5)
        share = values[:4].square().sum() / values.square().sum()
        assert float(row["energy_top_4"]) == pytest.approx(share.item(), rel=1e-5)
        assert (row["energy_top_32"] == "") == (min(layer.shape) < 32)
        assert float(row["stable_rank"]) == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-4)
    losses = rows_of(tmp_path / "spectra_errors.csv")
    assert len(losses) == 15 * 8
    assert {row["method"] for row in losses} == {*LOW_RANK, *MAGNITUDE}
    assert all(float(row["seconds"]) >= 0 for row in losses)
    by_layer = {(row["layer"], row["method"]): float(row["frobenius"]) for row in losses}
    for name in table:
        assert by_layer[name, "svd_topk"] < by_layer[name, "random_subspace"] < by_layer[name, "random_factors"]
        assert by_layer[name, "magnitude"] < by_layer[name, "magnitude_columns"]
    assert (tmp_path / "spectra_skipped.txt").read_text() == ""
    assert rows_of(tmp_path / "spectra_tests.csv")
    assert is_picture(tmp_path / "spectra.png")


def test_spectra_read_no_more_than_asked(checkpoint, tmp_path, monkeypatch):
    from sparse_unsloth.study.checkpoint import StoredLayer

    loaded, load = [], StoredLayer.load
    monkeypatch.setattr(StoredLayer, "load", lambda layer: loaded.append(layer) or load(layer))
    words = f"study spectra --model {checkpoint} --max-layers 3 --max-elements {32 * 32} --outdir {tmp_path}"
    assert main(words.split()) == 0
    assert [row["layer"] for row in rows_of(tmp_path / "spectra_layers.csv")] == [layer.name for layer in loaded]
    assert len(loaded) == 3
    assert all(layer.shape[0] * layer.shape[1] <= 1024 for layer in loaded)
    assert {layer.name.split(".")[2] for layer in loaded if "layers" in layer.name} == {"0", "1"}
    skipped = (tmp_path / "spectra_skipped.txt").read_text()
    assert skipped.count("mlp") == 6
    assert "q_proj" not in skipped


def test_whitened_spectra_weigh_by_the_inputs(checkpoint, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("the film is good", "a film was dull")))
    words = f"study spectra --model {checkpoint} --max-layers 2 --calibration-text {text} --outdir {tmp_path / 'out'}"
    assert main(words.split()) == 0
    rows = rows_of(tmp_path / "out" / "spectra_layers.csv")
    assert [row["space"] for row in rows] == ["plain", "whitened"] * 2


def test_whitened_energy_is_the_output_energy(checkpoint):
    """The squared norm of the whitened weight is the mean squared norm of what the layer puts out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    name, texts = "model.layers.1.mlp.up_proj", ["the film is good", "a film was very very dull"]
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, output: outputs.append(output[0]))
    for text in texts:
        model(**{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]})
    handle.remove()
    expected = torch.cat(outputs).square().sum(1).mean().item()
    moment = input_moments(checkpoint, [name], texts)[name]
    found = whiten(model.get_submodule(name).weight.detach(), moment).square().sum().item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep-ratio 0", r"keep_ratio must lie in \(0, 1\]"),
        ("--max-elements 10", "has more than 10 elements"),
        ("--calibration-text none.txt", "there is no file none.txt"),
        ("--model none/none", "is neither a folder nor a hub name that can be reached"),
        ("--model pypi:other", "pypi:other' is unknown"),
        ("--model EMPTY", "only safetensors checkpoints are read"),
    ],
)
def test_spectra_that_cannot_be(checkpoint, tmp_path, words, message, capsys):
    import re

    command = ["study", "spectra", "--model", str(checkpoint), "--outdir", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert main([*command, *words.replace("EMPTY", str(tmp_path / "empty")).split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_quantised_checkpoint_is_refused(tmp_path):
    save_file({"a.weight": torch.zeros(8, 1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(StudyError, match=r"a\.weight is quantised"):
        linear_layers(tmp_path)


# -- prune ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=4, target_modules=["0"]))
    (found,) = lora_pairs(model)
    with torch.no_grad():
        found.B.weight.normal_()
    return model, found


def test_energy_is_invariant_to_rescaling_and_magnitude_is_not(pair):
    _, found = pair
    before = {name: component_scores(found, name, seeded()) for name in ("energy", "magnitude")}
    with torch.no_grad():
        found.A.weight[1] *= 10
        found.B.weight[:, 1] /= 10
    after = {name: component_scores(found, name, seeded()) for name in ("energy", "magnitude")}
    torch.testing.assert_close(before["energy"], after["energy"])
    assert after["magnitude"][1] > 5 * before["magnitude"][1]


def test_energy_adds_up_for_orthogonal_components(pair):
    _, found = pair
    with torch.no_grad():
        found.A.weight.copy_(torch.linalg.qr(found.A.weight.t())[0].t() * torch.tensor([[1.0], [2], [3], [4]]))
    product = found.B.weight @ found.A.weight
    assert component_scores(found, "energy", seeded()).sum().item() == pytest.approx(product.square().sum().item())


def test_cutting_components_is_coherent_and_the_optimiser_goes_on(pair):
    """Against a model that computes only these components: same output, and the same weights after more steps."""
    model, found = pair
    x, target = torch.randn(7, 6), torch.randn(7, 5)
    parameters = [found.A.weight, found.B.weight]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def step():
        (model(x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    keep = torch.tensor([0, 3])
    A, B = (p.detach().clone() for p in parameters)
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    scale = model.base_model.model[0].scaling["default"]
    keep_components(found, keep, optimizer)
    assert found.rank == 2
    expected = model.base_model.model[0].base_layer(x) + scale * (x @ A[keep].t()) @ B[:, keep].t()
    torch.testing.assert_close(model(x), expected)

    narrow = [A[keep].requires_grad_(), B[:, keep].clone().requires_grad_()]
    other = torch.optim.AdamW(narrow, lr=0.1)
    for parameter, moment, dim in zip(narrow, moments, (0, 1), strict=True):
        other.state[parameter] = {k: v.index_select(dim, keep) if v.dim() else v.clone() for k, v in moment.items()}
    base = model.base_model.model[0].base_layer
    for _ in range(2):
        y = base(x).detach() + scale * (x @ narrow[0].t()) @ narrow[1].t()
        (y - target).square().sum().backward()
        other.step()
        other.zero_grad()
        step()
    torch.testing.assert_close(found.A.weight, narrow[0])
    torch.testing.assert_close(found.B.weight, narrow[1])


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    generator = random.Random(0)
    rows = []
    for _ in range(240):
        label = generator.randrange(2)
        word = generator.choice(("good", "fine") if label else ("bad", "dull"))
        rows.append({"sentence": f"{generator.choice(('a', 'the'))} film was {word}", "label": label})
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PRUNE = "--rank 8 --seeds 0 1 --warmup-steps 40 --steps 5 --test-size 60 --learning-rate 0.01 --keep-ratios 0.5 0.125"


def test_prune_from_end_to_end(checkpoint, reviews, tmp_path):
    words = f"study prune --model {checkpoint} --dataset {reviews} {PRUNE} --test wilcoxon --outdir {tmp_path}"
    assert main(words.split()) == 0
    rows = rows_of(tmp_path / "prune_trials.csv")
    assert len(rows) == 2 * (1 + 2 * 3)
    by_run = {(row["seed"], row["method"], row["keep_ratio"]): row for row in rows}
    for seed in "01":
        whole = by_run[seed, "none", "1.0"]
        assert float(whole["accuracy"]) > 0.9, "the warmed-up model has learnt the task"
        for method in ("energy", "magnitude", "random"):
            half, eighth = by_run[seed, method, "0.5"], by_run[seed, method, "0.125"]
            assert (half["components"], eighth["components"]) == ("4", "1")
            # LoRA parameters are in proportion to the components; the head comes on top.
            lora = [int(row["trainable"]) - int(eighth["trainable"]) for row in (whole, half)]
            assert lora[0] * 3 == lora[1] * 7
    tests = rows_of(tmp_path / "prune_tests.csv")
    assert len(tests) == 4 * 2 * 3
    assert {row["test"] for row in tests} == {"wilcoxon"}
    assert is_picture(tmp_path / "prune.png")


def test_every_run_of_a_seed_starts_from_the_same_warmed_up_model(checkpoint, reviews, tmp_path):
    words = f"study prune --model {checkpoint} --dataset {reviews} {PRUNE} --methods energy --keep-ratios 0.99 --outdir"
    assert main([*words.split(), str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "prune_trials.csv")
    assert not (tmp_path / "prune_tests.csv").exists(), "one method has nothing to be compared with"
    for seed in "01":
        whole, kept = (row for row in rows if row["seed"] == seed)
        assert kept["components"] == "8"
        for name in ("loss_pruned", "loss"):
            assert float(kept[name]) == pytest.approx(float(whole[name]), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep-ratios 1.5 --seeds 1", r"keep ratios must lie between 0 and 1, given \[1.5\]; two different seeds"),
        ("--rank 0", "rank must be at least 1"),
        ("--dataset none.csv", "there is no file none.csv"),
        ("--dataset no/such", "'no/such' cannot be loaded"),
        ("--model none", "model: 'none' cannot be loaded"),
    ],
)
def test_prune_that_cannot_be(checkpoint, reviews, tmp_path, words, message, capsys):
    import re

    command = ["study", "prune", "--model", str(checkpoint), "--dataset", str(reviews), "--outdir", str(tmp_path)]
    assert main([*command, *words.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"words": "a", "label": 1}] * 9, "needed are label and one of"),
        ([{"text": "a", "label": 1}] * 9, "has one label only"),
        ([{"text": "a", "label": i} for i in range(2)], "too few"),
    ],
)
def test_data_that_cannot_be(checkpoint, tmp_path, rows, message, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"study prune --model {checkpoint} --dataset {path} --test-size 3 --outdir {tmp_path}"
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_missing_scipy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(StudyError, match=r"pip install 'sparse-unsloth\[study\]'"):
        compare_paired([1.0, 2.0], [2.0, 4.0])
