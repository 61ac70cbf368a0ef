"""Tests `study prune` from end to end, offline, and pruned components against independent computations."""

import json
import random

import pytest
import torch

from sparse_unsloth.cli import main
from sparse_unsloth.reporting.paired_tests import compare_paired
from sparse_unsloth.reporting.tables import StudyError
from sparse_unsloth.study.components import component_scores, keep_components, lora_pairs

from outputs import is_picture, rows_of


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
