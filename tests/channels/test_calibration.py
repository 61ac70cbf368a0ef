"""The calibration pass compared with plain sums over stored activations, its errors, and estimators on a real model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_unsloth import attach
from sparse_unsloth.channels.calibration import collect_statistics, energy_captured
from sparse_unsloth.channels.factors import build_estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import find_layers

from tiny_models import always, make_base, make_batch, make_lora

SPARSE = SparsityConfig(mlp={"1-2": 0.75}, self_attn={"1": 0.5})
SPARSITY = SPARSE.layer_sparsity(3)


def collect(model, samples, sparsity=SPARSITY, **changes):
    return collect_statistics(model, find_layers(model), sparsity, samples, **changes)


def context_rows(batch):
    """Rows that calibration counts (docs/how-it-works.md, section 4.6): context tokens, but not a sequence's first."""
    rows = []
    for row in range(len(batch["labels"])):
        real = [t for t in range(batch["labels"].shape[1]) if batch["attention_mask"][row, t]]
        labels = batch["labels"][row]
        dense = {t for t in real if labels[t] != -100 or (t + 1 in real and labels[t + 1] != -100)}
        rows += [row * len(labels) + t for t in real[1:] if t not in dense]
    return torch.tensor(rows)


def inputs_of(model, module, batch):
    """The input of ``module`` in a plain evaluation forward, ``[batch * sequence, hidden_size]``."""
    kept = []

    def hook(module, args, kwargs):
        kept.append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    was = model.training
    with torch.no_grad():
        model.eval()(**batch)
    model.train(was)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_statistics_are_those_of_the_context_rows(family, side):
    model = make_base(family)
    samples = [make_batch(seed, side) for seed in range(3)]
    statistics = collect(model, samples)
    assert statistics.rows == sum(len(context_rows(batch)) for batch in samples)
    assert statistics.layers.keys() == {1, 2}
    assert statistics.layers[2].energy.keys() == {"mlp"}
    layer = model.model.layers[1]
    rows = torch.cat([inputs_of(model, layer.mlp, batch)[context_rows(batch)] for batch in samples])
    torch.testing.assert_close(statistics.layers[1].inputs["mlp"], rows)
    hidden = layer.mlp.act_fn(layer.mlp.gate_proj(rows)) * layer.mlp.up_proj(rows)
    torch.testing.assert_close(statistics.layers[1].energy["mlp"], hidden.square().mean(0), rtol=1e-4, atol=1e-9)
    rows = torch.cat([inputs_of(model, layer.self_attn, batch)[context_rows(batch)] for batch in samples])
    torch.testing.assert_close(statistics.layers[1].inputs["self_attn"], rows)
    for name in "qkv":
        values = F.linear(rows, getattr(layer.self_attn, f"{name}_proj").weight)
        torch.testing.assert_close(statistics.layers[1].energy[name], values.square().mean(0), rtol=1e-4, atol=1e-9)


def padding_free(batch):
    real = batch["attention_mask"].bool()
    lengths = batch["attention_mask"].sum(1)
    return {
        "input_ids": batch["input_ids"][real][None],
        "labels": batch["labels"][real][None],
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
    }


def test_padded_and_padding_free_samples_give_the_same_statistics():
    model = make_base("llama")
    padded = collect(model, [make_batch(0)])
    free = collect(model, [padding_free(make_batch(0))])
    lengths = make_batch(0)["attention_mask"].sum(1).int()
    counted = collect(model, [{**padding_free(make_batch(0)), "packed_seq_lengths": lengths}])
    for other in (free, counted):
        assert other.rows == padded.rows
        torch.testing.assert_close(other.layers[1].energy["mlp"], padded.layers[1].energy["mlp"], rtol=1e-3, atol=1e-9)


def test_inputs_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("sparse_unsloth.channels.calibration.INPUT_ROWS", 12)
    model = make_base("llama")
    samples = [make_batch(seed) for seed in range(3)]
    whole = [inputs_of(model, model.model.layers[1].mlp, batch)[context_rows(batch)] for batch in samples]
    assert all(len(rows) > 8 for rows in whole)
    thinned = torch.cat([rows[:: -(-len(rows) // 4)] for rows in whole])
    torch.testing.assert_close(collect(model, samples).layers[1].inputs["mlp"], thinned)


def test_without_dense_tokens_every_token_counts():
    model = make_base("llama")
    batch = make_batch(0)
    assert collect(model, [batch], dense_tokens="none").rows == batch["attention_mask"].sum() - len(batch["labels"])


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state().tolist(),
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_state(model, before):
    after = state_of(model)
    assert after[:3] == before[:3]
    assert all(torch.equal(value, before[3][name]) for name, value in after[3].items())


class Stumbling(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        self.model(**batch)
        raise RuntimeError("out of memory")


def test_the_model_is_as_before():
    model = make_lora("llama")
    model.get_base_model().model.layers[0].eval()
    before = state_of(model)
    first = collect(model, [make_batch(0)])
    assert_state(model, before)
    again = collect(model, [make_batch(0)])
    assert torch.equal(first.layers[1].energy["mlp"], again.layers[1].energy["mlp"])
    assert torch.equal(first.layers[1].inputs["mlp"], again.layers[1].inputs["mlp"])
    broken = Stumbling(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(broken, [make_batch(0)])
    assert_state(model, before)


def test_an_attached_model_is_calibrated_densely():
    plain = make_lora("llama")
    expected = collect(plain, [make_batch(0)])
    attach(plain, always(mlp={"all": 0.9}))
    found = collect(plain, [make_batch(0)])
    assert torch.equal(found.layers[1].energy["mlp"], expected.layers[1].energy["mlp"])
    assert torch.equal(found.layers[2].inputs["mlp"], expected.layers[2].inputs["mlp"])


def test_four_bit_weights_stay_unpacked():
    bnb = pytest.importorskip("bitsandbytes")
    model = make_base("llama")
    for layer in find_layers(model):
        for name, module in layer.projections().items():
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            part, projection = name.split(".")
            setattr(getattr(layer.module, part), projection, packed.to("cpu"))
    packed = model.model.layers[1].mlp.gate_proj
    before, flag = packed.weight.data.clone(), packed.support_avx512bf16_for_cpu
    statistics = collect(model, [make_batch(0)])
    assert packed.support_avx512bf16_for_cpu == flag
    assert not getattr(packed.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(packed.weight.data, before)
    assert statistics.layers[1].energy["mlp"].isfinite().all()


def test_no_samples():
    for nothing in ([], None):
        with pytest.raises(EstimatorError, match="no calibration samples"):
            collect(make_base("llama"), nothing)


def test_samples_without_labels():
    batch = make_batch(0)
    del batch["labels"]
    with pytest.raises(EstimatorError, match=r"sample 1 has no labels \(its keys: input_ids, attention_mask\)"):
        collect(make_base("llama"), [make_batch(0), batch])


def test_samples_without_context():
    batch = make_batch(0)
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(
        EstimatorError, match=r"None of the 1 calibration samples has a context token.*Mask the prompts"
    ):
        collect(make_base("llama"), [batch])
    assert collect(make_base("llama"), [batch, make_batch(1)]).rows == len(context_rows(make_batch(1)))


def test_layers_that_the_forward_does_not_reach():
    model = make_base("llama")
    with pytest.raises(EstimatorError, match=r"never called model\.layers\.1\.mlp \(3 of 3 parts\)"):
        collect_statistics(make_base("llama"), find_layers(model), SPARSITY, [make_batch(0)])


def test_energy_captured_is_one_for_the_oracle_and_less_for_others():
    model = make_base("llama")
    samples = [make_batch(seed) for seed in range(2)]
    layers = find_layers(model)
    selectors = {
        criterion: ChannelSelector(SPARSE.model_copy(update={"criterion": criterion}), layers, None)
        for criterion in ("oracle", "random")
    }
    oracle, random = energy_captured(model, layers, SPARSITY, selectors, samples).values()
    assert oracle.mlp.keys() == {1, 2}
    assert oracle.qk.keys() == oracle.v.keys() == {1}
    for what in ("mlp", "v"):
        assert oracle.mean(what) == pytest.approx(1)
        assert 0 < random.mean(what) < 0.95
    assert 0 < random.mean("qk") < oracle.mean("qk") <= 1 + 1e-6, "chosen in pairs, judged by single channels"


def test_energy_captured_leaves_out_the_text_that_all_prompts_share():
    model = make_base("llama")
    plain = [make_batch(seed, lengths=((9, 4), (5, 6))) for seed in range(2)]
    shared = [dict(batch, input_ids=batch["input_ids"].clone()) for batch in plain]
    for batch in shared:  # the prompt's last token is a loss token
        batch["input_ids"][:, :2] = torch.tensor([7, 8])
        batch["input_ids"][0, 7], batch["input_ids"][1, 3] = 9, 9
    layers = find_layers(model)
    seen = []

    class Watch:
        def mlp(self, layer, rows, sparsity):
            seen.append(rows)
            return ChannelSelector(SPARSE.model_copy(update={"criterion": "oracle"}), layers, None).mlp(
                layer, rows, sparsity
            )

    only_mlp = SparsityConfig(mlp={"1": 0.5}).layer_sparsity(3)
    watch = {"watch": Watch()}
    energy_captured(model, layers, only_mlp, watch, shared)
    expected = [
        inputs_of(model, model.model.layers[1].mlp, batch)[[2, 3, 4, 5, 6, batch["labels"].shape[1] + 2]]
        for batch in shared
    ]
    for rows, own in zip(seen, expected, strict=True):
        torch.testing.assert_close(rows, own)
    seen.clear()
    energy_captured(model, layers, only_mlp, watch, shared, skip_shared=False)
    assert [len(rows) for rows in seen] == [len(context_rows(batch)) for batch in shared]
    with pytest.raises(EstimatorError, match="prompts are alike"):
        energy_captured(model, layers, only_mlp, watch, [make_batch(0, lengths=((9, 4),))])


TASKS = {  # of the quickstart's three those with short prompts
    "word_sequence_reversal": {"min_words": 3, "max_words": 6},
    "family_relationships": {},
}


def prompts(tokenizer, count, seed, tasks=TASKS, size=8):
    """Batches of chat prompts with answers, tasks in turn, padded on the right."""
    import reasoning_gym

    sets = [reasoning_gym.create_dataset(name, size=count, seed=seed, **options) for name, options in tasks.items()]
    batches = []
    for start in range(0, count, size):
        rows = []
        for number in range(start, start + size):
            item = sets[number % len(sets)][number]
            chat = [{"role": "user", "content": item["question"]}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            rows.append([tokenizer(text)["input_ids"] for text in (prompt, item["answer"] + tokenizer.eos_token)])
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        batch = {
            "input_ids": torch.full((size, longest), tokenizer.pad_token_id),
            "labels": torch.full((size, longest), -100),
            "attention_mask": torch.zeros(size, longest, dtype=torch.long),
        }
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            batch["input_ids"][row, :end] = torch.tensor(prompt + answer)
            batch["labels"][row, len(prompt) : end] = torch.tensor(answer)
            batch["attention_mask"][row, :end] = 1
        batches.append(batch)
    return batches


@pytest.mark.slow
def test_calibrated_estimators_keep_most_of_the_oracles_energy_on_a_real_model(capsys):
    """Nine layers of SmolLM2-135M, MLPs of layers 1-8; batches of 8 prompts outside the calibration, no text shared."""
    pytest.importorskip("reasoning_gym")
    transformers = pytest.importorskip("transformers")
    from sparse_unsloth.data.smollm2 import smollm2_checkpoint
    from sparse_unsloth.errors import DataError

    try:
        checkpoint = smollm2_checkpoint()
    except DataError as error:
        pytest.skip(str(error))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, num_hidden_layers=9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    layers = find_layers(model)
    kept = {share: SparsityConfig(mlp={"1-8": 1 - share}) for share in (0.1, 0.25)}
    sparsity = kept[0.1].layer_sparsity(9)
    calibrated, held_out = prompts(tokenizer, 16, seed=5), prompts(tokenizer, 8, seed=777)
    statistics = collect_statistics(model, layers, sparsity, calibrated)
    texts = [{tuple(row) for batch in part for row in batch["input_ids"].tolist()} for part in (calibrated, held_out)]
    assert texts[0].isdisjoint(texts[1])
    kinds = ("svd", "prior")
    estimators = {kind: build_estimator(layers, sparsity, EstimatorConfig(kind=kind), statistics) for kind in kinds}
    figures = {}
    for share, config in kept.items():
        selectors = {kind: ChannelSelector(config, layers, estimators[kind]) for kind in kinds}
        results = energy_captured(model, layers, config.layer_sparsity(9), selectors, held_out)
        figures |= {(kind, share): result.mean("mlp") for kind, result in results.items()}
    with capsys.disabled():
        print("\nShare of the oracle's MLP energy captured (SmolLM2-135M, layers 1-8, rank 8), 10 % / 25 % kept:")
        for kind in kinds:
            print(f"  {kind:9s}{figures[kind, 0.1]:.3f} / {figures[kind, 0.25]:.3f}")
    assert min(figures["prior", 0.1], figures["prior", 0.25]) >= 0.75
    for share in kept:
        assert figures["svd", share] < figures["prior", share]
