"""Factors compared with their definitions; estimator files that fit, are damaged, or are of another model."""

import importlib.metadata
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from sparse_unsloth.channels.calibration import collect_statistics
from sparse_unsloth.channels.energy import attention_energy, mlp_energy
from sparse_unsloth.channels.factors import build_estimator, obtain_estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.channels.storage import fingerprint, load_estimator, save_estimator
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import find_layers

from tiny_models import make_base, make_batch, make_lora

SPARSE = SparsityConfig(mlp={"1-2": 0.75}, self_attn={"1": 0.5})
SPARSITY = SPARSE.layer_sparsity(3)
KINDS = ["svd", "prior"]


@pytest.fixture
def model():
    return make_base("llama")


@pytest.fixture
def layers(model):
    return find_layers(model)


def samples(count=3):
    return [make_batch(seed, lengths=((30, 4), (25, 6), (28, 2))) for seed in range(count)]


def config(kind, **changes):
    return EstimatorConfig(kind=kind, **changes)


def obtained(model, path=None, kind="svd", given=None, **changes):
    setting = config(kind, path=None if path is None else str(path), **changes)
    return obtain_estimator(model, find_layers(model), SPARSITY, setting, samples=given)


def assert_same(left, right):
    assert (left.kind, left.rank, left.layers.keys()) == (right.kind, right.rank, right.layers.keys())
    for index, estimate in left.layers.items():
        other = right.layers[index]
        assert estimate.factors.keys() == other.factors.keys()
        for name, factors in estimate.factors.items():
            assert torch.equal(factors.down, other.factors[name].down)
            assert torch.equal(factors.up, other.factors[name].up)
        for what in ("energy", "gain"):
            assert getattr(estimate, what).keys() == getattr(other, what).keys()
            for name, vector in getattr(estimate, what).items():
                assert torch.equal(vector, getattr(other, what)[name])


def test_svd_factors_are_the_best_of_their_rank(layers):
    estimator = build_estimator(layers, SPARSITY, config("svd", rank=5))
    assert estimator.layers.keys() == {1, 2}
    assert estimator.layers[2].factors.keys() == {"mlp.gate_proj", "mlp.up_proj"}
    for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        weight = layers[1].projections()[name].weight.detach()
        down, up = estimator.layers[1].factors[name]
        assert down.shape == (5, weight.shape[1])
        assert up.shape == (weight.shape[0], 5)
        least = torch.linalg.svdvals(weight)[5:].norm()
        assert (weight - up @ down).norm() <= 1.02 * least


def test_whitened_factors_lose_least_over_the_inputs(model, layers):
    statistics = collect_statistics(model, layers, SPARSITY, samples())
    estimator = build_estimator(layers, SPARSITY, config("prior", rank=3), statistics)
    plain = build_estimator(layers, SPARSITY, config("svd", rank=3))
    for name in ("mlp.up_proj", "self_attn.v_proj"):
        rows = statistics.layers[1].inputs[name.split(".")[0]]
        weight = layers[1].projections()[name].weight.detach()
        loss = {
            what: (rows @ (weight - factors.up @ factors.down).t()).norm()
            for what, factors in (("w", estimator.layers[1].factors[name]), ("svd", plain.layers[1].factors[name]))
        }
        assert loss["w"] <= 1.02 * torch.linalg.svdvals(rows @ weight.t())[3:].norm()
        assert loss["w"] < loss["svd"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_factors_of_the_full_rank_give_the_true_energies(family):
    layers = find_layers(make_base(family, num_key_value_heads=4, mlp_bias=True))
    rows = torch.randn(40, 64)
    estimator = build_estimator(layers, SPARSITY, config("svd", rank=64))
    torch.testing.assert_close(estimator.mlp(layers[1], rows), mlp_energy(layers[1], rows), rtol=1e-3, atol=1e-5)
    for mine, true in zip(estimator.attention(layers[1], rows), attention_energy(layers[1], rows), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-5)


def test_prior_is_the_static_energy_where_the_batch_is_as_calibrated(model, layers):
    """On the calibration inputs the estimate equals its mean, so the prior is the calibrated energy."""
    statistics = collect_statistics(model, layers, SPARSITY, samples())
    prior = build_estimator(layers, SPARSITY, config("prior"), statistics)
    known = statistics.layers[1]
    ratio = prior.mlp(layers[1], known.inputs["mlp"]) / known.energy["mlp"]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    for estimated, name in zip(prior.attention(layers[1], known.inputs["self_attn"]), "qkv", strict=True):
        ratio = estimated / known.energy[name]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_family(family, kind):
    model = make_lora(family)
    layers = find_layers(model)
    estimator = obtained(model, kind=kind, given=samples())
    selector = ChannelSelector(SPARSE, layers, estimator)
    rows = torch.randn(20, 64)
    assert len(selector.mlp(layers[2], rows, 0.75).channels) == 32
    selection = selector.attention(layers[1], rows, 0.5)
    assert len(selection.q) == len(selection.o) == layers[1].num_heads * layers[1].head_dim // 2
    assert len(selection.k) == len(selection.v) == layers[1].num_kv_heads * layers[1].head_dim // 2
    for dtype in (torch.bfloat16, torch.float64):
        assert estimator.mlp(layers[1], rows.to(dtype)).isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert estimator.mlp(layers[1], rows.to(dtype)).isfinite().all()
            assert all(energy.isfinite().all() for energy in estimator.attention(layers[1], rows.to(dtype)))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_factors_are_of_the_dequantised_weight(quant_type):
    """Regression: factors of packed 4-bit bytes were zero, and the top channels 0..k-1."""
    bnb = pytest.importorskip("bitsandbytes")
    model = make_base("llama")
    layers = find_layers(model)
    for layer in layers:
        for name, module in layer.projections().items():
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type=quant_type)
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type=quant_type)
            part, projection = name.split(".")
            setattr(getattr(layer.module, part), projection, packed.to("cpu"))
    layers = find_layers(model)
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None])
    estimator = obtained(model)
    packed = layers[1].mlp.up_proj
    assert packed.weight.dtype == torch.uint8
    weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
    down, up = estimator.layers[1].factors["mlp.up_proj"]
    assert (weight - up @ down).norm() <= 1.02 * torch.linalg.svdvals(weight)[8:].norm()
    rows = torch.randn(30, 64)
    channels = ChannelSelector(SPARSE, layers, estimator).mlp(layers[1], rows, 0.75).channels
    assert channels.tolist() != list(range(32))
    assert len(channels) == 32
    assert fingerprint(layers[1], "mlp") != fingerprint(layers[2], "mlp")


def test_building_leaves_the_random_state_alone_and_repeats(layers):
    state = torch.get_rng_state()
    first = build_estimator(layers, SPARSITY, config("svd"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert_same(first, build_estimator(layers, SPARSITY, config("svd")))


def test_the_estimator_never_enters_the_module_tree(model, layers):
    before = set(model.state_dict())
    estimator = obtained(model)
    ChannelSelector(SPARSE, layers, estimator).mlp(layers[1], torch.randn(4, 64), 0.5)
    assert set(model.state_dict()) == before


def test_auto_is_prior_with_samples_and_svd_without(model, layers):
    assert obtained(model, kind="auto", given=samples()).kind == "prior"
    with pytest.warns(UserWarning, match="falls back to plain SVD.*calibration_samples="):
        assert obtained(model, kind="auto").kind == "svd"
    assert obtain_estimator(model, layers, SPARSITY, config("auto"), wait=True) is None


def test_the_calibrated_kind_needs_samples(model, layers):
    with pytest.raises(EstimatorError, match=r"prior' is calibrated, and there are no calibration samples.*kind: svd"):
        obtained(model, kind="prior")
    with pytest.raises(EstimatorError, match="calibrated"):
        build_estimator(layers, SPARSITY, config("prior"))
    assert obtain_estimator(model, layers, SPARSITY, config("prior"), wait=True) is None


def test_statistics_must_hold_the_layers(model, layers):
    few = collect_statistics(model, layers, SparsityConfig(mlp={"1": 0.5}).layer_sparsity(3), samples())
    with pytest.raises(EstimatorError, match=r"lack what is needed for model\.layers\.1\.self_attn"):
        build_estimator(layers, SPARSITY, config("prior"), few)


def test_rank_above_the_weights_is_refused(layers):
    with pytest.raises(EstimatorError, match=r"rank: 65 exceeds the rank of model.layers.1.mlp.gate_proj, \(128, 64\)"):
        build_estimator(layers, SPARSITY, config("svd", rank=65))


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_back_the_estimator(model, layers, kind, tmp_path):
    path = tmp_path / "folder" / "estimator.safetensors"
    made = obtained(model, path, kind, samples())
    assert path.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = obtained(model, path, kind)
        assert_same(made, read)
        assert_same(made, obtained(model, path, "auto"))
    assert [file.name for file in path.parent.iterdir()] == ["estimator.safetensors"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_metadata_says_what_the_file_was_made_from(model, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "e.safetensors"
    model.config._name_or_path, model.config._commit_hash = "some/model", "abc123"
    obtained(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["kind"], metadata["rank"]) == ("svd", "8")
    assert (metadata["model_name"], metadata["model_revision"]) == ("some/model", "abc123")
    assert set(json.loads(metadata["weight_fingerprints"])) == {"1.mlp", "1.self_attn", "2.mlp"}
    assert json.loads(metadata["versions"])["torch"] == importlib.metadata.version("torch")


def test_a_file_of_more_layers_serves_a_configuration_of_fewer(model, layers, tmp_path):
    path = tmp_path / "e.safetensors"
    obtained(model, path)
    fewer = SparsityConfig(mlp={"2": 0.9}).layer_sparsity(3)
    assert load_estimator(path, layers, fewer, config("svd")).layers.keys() == {2}


def test_adapters_do_not_change_the_fingerprint_but_merging_does(model, tmp_path):
    path = tmp_path / "e.safetensors"
    obtained(model, path)
    adapted = make_lora(base=model)
    obtained(adapted, path)
    adapted.merge_adapter()
    with pytest.raises(EstimatorError, match="its adapter is merged"):
        obtained(adapted, path)


def test_files_of_other_models_are_refused(model, tmp_path):
    path = tmp_path / "e.safetensors"
    model.config._name_or_path = "some/model"
    obtained(model, path)
    before = path.read_bytes()
    message = r"weights of some/model; the fingerprints of 1\.mlp, 1\.self_attn, 2\.mlp differ.*delete this one"
    with pytest.raises(EstimatorError, match=message):
        obtained(make_base("llama", seed=1), path)
    with pytest.raises(EstimatorError, match="fingerprints of"):
        obtained(make_base("llama", dtype=torch.bfloat16), path)
    one = make_base("llama")
    with torch.no_grad():
        one.model.layers[2].mlp.down_proj.weight += 0.01
    with pytest.raises(EstimatorError, match=r"fingerprints of 2\.mlp differ"):
        obtained(one, path)
    assert path.read_bytes() == before


def test_files_that_do_not_fit_the_configuration_are_refused(model, layers, tmp_path):
    path = tmp_path / "e.safetensors"
    obtained(model, path)
    with pytest.raises(
        EstimatorError, match=r"factors of rank 8, but the configuration asks for 4.*estimator\.rank: 8"
    ):
        obtained(model, path, rank=4)
    with pytest.raises(EstimatorError, match=r"kind 'svd', but the configuration asks for 'prior'.*kind: svd"):
        obtained(model, path, "prior", samples())
    more = SparsityConfig(mlp={"0-2": 0.5}).layer_sparsity(3)
    with pytest.raises(EstimatorError, match=r"nothing for 0\.mlp, which the configuration makes sparse"):
        load_estimator(path, layers, more, config("svd"))
    with pytest.raises(EstimatorError, match="there is no file"):
        load_estimator(tmp_path / "none.safetensors", layers, SPARSITY, config("svd"))


@pytest.mark.parametrize("kind", ["whitened", "static"])
def test_files_of_kinds_that_are_gone_are_refused(model, layers, kind, tmp_path):
    path = tmp_path / "e.safetensors"
    made = obtained(model, path, "prior", samples())
    made.kind = kind
    save_estimator(made, path, layers)
    for asked in ("auto", "prior"):
        with pytest.raises(EstimatorError, match=f"of kind '{kind}'.*set 'prior', and point estimator.path to another"):
            obtained(model, path, asked, samples())


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_truncated_files_are_never_used(model, layers, kept, tmp_path):
    path = tmp_path / "e.safetensors"
    made = obtained(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(EstimatorError, match="damaged"):
        load_estimator(path, layers, SPARSITY, config("svd"))
    with pytest.warns(UserWarning, match="damaged.*built again now"):
        assert_same(made, obtained(model, path))
    assert_same(made, load_estimator(path, layers, SPARSITY, config("svd")))


def test_flipped_bytes_are_never_used(model, layers, tmp_path):
    path = tmp_path / "e.safetensors"
    obtained(model, path)
    whole = bytearray(path.read_bytes())
    for position in [*range(0, 1200, 97), *range(1200, len(whole), 4001), len(whole) - 1]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(EstimatorError):
            load_estimator(path, layers, SPARSITY, config("svd"))


def test_damaged_files_of_calibrated_kinds_are_built_again_only_with_samples(model, tmp_path):
    path = tmp_path / "e.safetensors"
    made = obtained(model, path, "prior", samples())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(EstimatorError, match="damaged"):
        obtained(model, path, "prior")
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(made, obtained(model, path, "prior", samples()))


def test_other_files_are_never_overwritten(model, tmp_path):
    text, foreign = tmp_path / "notes.txt", tmp_path / "adapter.safetensors"
    text.write_text("my notes")
    save_file({"lora": torch.zeros(3)}, foreign)
    for path, message in (
        (text, "no safetensors file"),
        (foreign, "no estimator of this package, so it is not overwritten"),
    ):
        before = path.read_bytes()
        with pytest.raises(EstimatorError, match=message):
            obtained(model, path)
        assert path.read_bytes() == before


def test_a_write_that_dies_leaves_the_old_file(model, layers, tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    made = obtained(model, path)
    before = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    for what in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sparse_unsloth.utils.tensor_file.os.{what}", killed)
            with pytest.raises(KeyboardInterrupt):
                save_estimator(made, path, layers)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]


def published(folder, layers, rank=8, swap=False, suffix=("w1", "w2"), **config_changes):
    """Factors in the format that z-lab publishes: w1 [in, rank], w2 [rank, out]."""
    tensors = {}
    for layer in layers[1:]:
        for name, module in layer.projections().items():
            if name.endswith(("down_proj", "o_proj")):
                continue
            left, values, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            w1, w2 = right[:rank].t() * values[:rank].sqrt(), (left[:, :rank] * values[:rank].sqrt()).t()
            for key, factor in zip(suffix, (w1, w2), strict=True):
                tensors[f"model.layers.{layer.index}.{name}.{key}"] = (factor.t() if swap else factor).contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"predictor_rank": rank, "modes": {}, **config_changes}))
    return folder


@pytest.mark.parametrize("kind", ["auto", "svd"])
@pytest.mark.parametrize("swap", [False, True])
def test_published_estimators_are_read(model, layers, swap, kind, tmp_path):
    folder = published(tmp_path / "hub", layers, swap=swap)
    for path in (folder, folder / "model.safetensors"):
        estimator = obtained(model, path, kind)
        assert (estimator.kind, estimator.rank) == ("svd", 8)
        rows = torch.randn(30, 64)
        ours = build_estimator(layers, SPARSITY, config("svd"))
        torch.testing.assert_close(estimator.mlp(layers[1], rows), ours.mlp(layers[1], rows), rtol=0.2, atol=0.05)
        weight = layers[1].mlp.gate_proj.weight.detach()
        down, up = estimator.layers[1].factors["mlp.gate_proj"]
        assert (weight - up @ down).norm() <= 1.001 * torch.linalg.svdvals(weight)[8:].norm()


def test_published_estimators_that_do_not_fit_are_refused(model, layers, tmp_path):
    folder = published(tmp_path / "hub", layers)
    with pytest.raises(EstimatorError, match="factors of rank 8, but the configuration asks for 4"):
        obtained(model, folder, rank=4)
    with pytest.raises(EstimatorError, match="kind 'svd', but the configuration asks for 'prior'"):
        obtained(model, folder, "prior", samples())
    with pytest.raises(EstimatorError, match=r"nothing for 0\.mlp"):
        load_estimator(folder, layers, SparsityConfig(mlp={"0": 0.5}).layer_sparsity(3), config("svd"))
    other = make_base("llama", intermediate_size=96)
    with pytest.raises(
        EstimatorError, match=r"factors of 1\.mlp\.gate_proj.*do not fit this model's weight \[96, 64\]"
    ):
        obtained(other, folder)
    published(folder, layers, predictor_rank=16)
    with pytest.raises(EstimatorError, match=r"factors of rank \[8\], but config\.json says 16"):
        obtained(model, folder)
    published(folder, layers, suffix=("w1", "w3"))
    with pytest.raises(EstimatorError, match="has only one of w1 and w2"):
        obtained(model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(EstimatorError, match="damaged"):
        obtained(model, folder)
    assert file.exists()
    file.unlink()
    with pytest.raises(EstimatorError, match=r"folder without model\.safetensors"):
        obtained(model, folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_file_made_on_the_cpu_serves_the_gpu(model, tmp_path):
    path = tmp_path / "e.safetensors"
    made = obtained(model, path, "prior", samples())
    on_gpu = model.cuda()
    read = obtained(on_gpu, path, "prior")
    assert_same(made, read)
    fresh = obtained(on_gpu, None, "prior", samples())
    torch.testing.assert_close(fresh.layers[1].energy["mlp"], made.layers[1].energy["mlp"], rtol=1e-2, atol=1e-8)
