"""Tests `study spectra` from end to end, offline, and spectra against independent computations."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sparse_unsloth.cli import main
from sparse_unsloth.reporting.tables import StudyError
from sparse_unsloth.study.approximation import LOW_RANK, MAGNITUDE
from sparse_unsloth.study.checkpoint import linear_layers
from sparse_unsloth.study.whitening import input_moments, whiten

from outputs import is_picture, rows_of


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
