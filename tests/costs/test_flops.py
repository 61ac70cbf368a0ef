"""FLOPs against PyTorch's counter: of a dense PEFT Llama, and of sparse matmuls that are gathered explicitly."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sparse_unsloth import attach, get_state
from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.costs.flops import (
    ATTENTION,
    MLP,
    ModelShape,
    TrainingStep,
    attention_pairs,
    step_flops,
)
from sparse_unsloth.errors import ConfigError

SHAPE = ModelShape(
    hidden_size=48, intermediate_size=112, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=96
)
BATCH, SEQUENCE, RANK = 3, 20, 4
TOKENS = BATCH * SEQUENCE
DENSE = [(0.0, 0.0)] * SHAPE.num_layers


def count(function) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def peft_llama(targets=(*ATTENTION, *MLP), layers=SHAPE.num_layers):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        vocab_size=SHAPE.vocab_size,
        attn_implementation="eager",
    )
    assert ModelShape.from_config(config) == replace(SHAPE, num_layers=layers)
    lora = peft.LoraConfig(r=RANK, target_modules=list(targets), task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()


def measure(model) -> tuple[int, int]:
    ids = torch.randint(SHAPE.vocab_size, (BATCH, SEQUENCE))
    forward, output = count(lambda: model(input_ids=ids, labels=ids, use_cache=False))
    backward, _ = count(output.loss.backward)
    return forward, backward


def expected(**options):
    return step_flops(SHAPE, DENSE, TrainingStep(TOKENS, 0, [SEQUENCE] * BATCH, RANK, attention="eager", **options))


@pytest.mark.parametrize("input_requires_grad", [False, True])
def test_dense_peft_llama(input_requires_grad):
    model = peft_llama()
    if input_requires_grad:
        model.enable_input_require_grads()
    forward, backward = measure(model)
    flops = expected(input_requires_grad=input_requires_grad)
    assert flops.forward.total == pytest.approx(forward, rel=0.001)
    assert flops.backward.total == pytest.approx(backward, rel=0.001)
    assert flops.recompute.total == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = peft_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    forward, backward = measure(model)
    flops = expected(checkpointing=True)
    assert flops.forward.total == pytest.approx(forward, rel=0.001)
    assert flops.recompute.total + flops.backward.total == pytest.approx(backward, rel=0.001 if reentrant else 0.01)
    assert flops.total == pytest.approx(forward + backward, rel=0.01)


def test_some_lora_targets():
    targets = ("q_proj", "v_proj", "down_proj")
    model = peft_llama(targets)
    model.enable_input_require_grads()
    forward, backward = measure(model)
    flops = expected(lora_targets=targets, input_requires_grad=True)
    assert flops.forward.total == pytest.approx(forward, rel=0.001)
    assert flops.backward.total == pytest.approx(backward, rel=0.001)


def test_full_fine_tuning():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{key: getattr(SHAPE, key) for key in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")},
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        attn_implementation="eager",
    )
    forward, backward = measure(transformers.LlamaForCausalLM(config).train())
    flops = step_flops(
        SHAPE, DENSE, TrainingStep(TOKENS, 0, [SEQUENCE] * BATCH, lora_rank=0, trainable_base=True, attention="eager")
    )
    assert flops.forward.total == pytest.approx(forward, rel=0.001)
    assert flops.backward.total == pytest.approx(backward, rel=0.001)


class NaiveSparse:
    """The masked model with explicit matmuls: base products of gathered rows and channels, LoRA on all rows."""

    def __init__(self, layer_sparsity, dense_rows, estimator_rank):
        self.layer_sparsity = layer_sparsity
        rows = torch.randperm(TOKENS)
        self.dense, self.context = rows[:dense_rows], rows[dense_rows:]
        self.estimator_rank = estimator_rank
        self.layers = [
            {
                name: (
                    torch.randn(outputs, inputs) / inputs**0.5,
                    torch.randn(RANK, inputs, requires_grad=True),
                    torch.randn(outputs, RANK, requires_grad=True),
                )
                for name, (inputs, outputs) in SHAPE.projections().items()
            }
            for _ in layer_sparsity
        ]

    def project(self, name, weights, x, channels, axis):
        """Context rows use `channels` of the output (axis 0) or of the input (axis 1)."""
        weight, a, b = weights[name]
        y = (x @ a.T) @ b.T
        y = y.index_add(0, self.dense, x[self.dense] @ weight.T)
        context = x[self.context]
        if axis == 1:
            return y.index_add(0, self.context, context[:, channels] @ weight[:, channels].T)
        base = torch.zeros(len(self.context), weight.shape[0]).index_copy(1, channels, context @ weight[channels].T)
        return y.index_add(0, self.context, base)

    def score(self, x, outputs):
        with torch.no_grad():
            left = torch.randn(x.shape[1], self.estimator_rank)
            return (x[self.context] @ left) @ torch.randn(self.estimator_rank, outputs)

    def attention(self, weights, x, sparsity):
        queries, keys = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim
        groups = SHAPE.num_heads // SHAPE.num_kv_heads
        if sparsity and self.estimator_rank:
            for outputs in (queries, keys, keys):
                self.score(x, outputs)
        chosen = torch.randperm(keys)[: keep_count(keys, sparsity)]
        head, dim = chosen // SHAPE.head_dim, chosen % SHAPE.head_dim
        repeated = torch.cat([(head * groups + g) * SHAPE.head_dim + dim for g in range(groups)])
        q, k, v = (
            self.project(name, weights, x, channels, 0).view(BATCH, SEQUENCE, -1, SHAPE.head_dim).transpose(1, 2)
            for name, channels in (("q_proj", repeated), ("k_proj", chosen), ("v_proj", chosen))
        )
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        a = (q @ k.transpose(2, 3)).softmax(-1) @ v
        a = a.transpose(1, 2).reshape(TOKENS, queries)
        return self.project("o_proj", weights, a, repeated, 1)

    def mlp(self, weights, x, sparsity):
        inner = SHAPE.intermediate_size
        if sparsity and self.estimator_rank:
            self.score(x, inner), self.score(x, inner)
        chosen = torch.randperm(inner)[: keep_count(inner, sparsity)]
        gate = self.project("gate_proj", weights, x, chosen, 0)
        up = self.project("up_proj", weights, x, chosen, 0)
        return self.project("down_proj", weights, torch.nn.functional.silu(gate) * up, chosen, 1)

    def __call__(self, x, head_rows):
        for weights, (mlp, self_attn) in zip(self.layers, self.layer_sparsity, strict=True):
            x = x + self.attention(weights, x, self_attn)
            x = x + self.mlp(weights, x, mlp)
        return (x[:head_rows] @ torch.randn(SHAPE.hidden_size, SHAPE.vocab_size)).sum()


@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize(
    ("layer_sparsity", "dense_rows", "estimator_rank"),
    [
        ([(0.0, 0.0), (0.9, 0.5), (0.99, 0.75)], 17, 8),
        ([(0.5, 0.25), (0.0, 0.75), (0.75, 0.0)], 1, 4),
        ([(0.999, 0.999)] * 3, TOKENS - 1, 0),
        ([(0.9, 0.9)] * 3, 0, 0),
    ],
)
def test_sparse_against_gathered_products(layer_sparsity, dense_rows, estimator_rank, input_requires_grad):
    model = NaiveSparse(layer_sparsity, dense_rows, estimator_rank)
    x = torch.randn(TOKENS, SHAPE.hidden_size, requires_grad=input_requires_grad)
    forward, loss = count(lambda: model(x, head_rows=11))
    backward, _ = count(loss.backward)
    flops = step_flops(
        SHAPE,
        layer_sparsity,
        TrainingStep(
            dense_rows,
            TOKENS - dense_rows,
            [SEQUENCE] * BATCH,
            RANK,
            head_tokens=11,
            attention="eager",
            input_requires_grad=input_requires_grad,
            estimator_rank=estimator_rank,
        ),
    )
    assert flops.forward.total == forward
    assert flops.backward.total == backward


def test_fused_attention_recomputes_scores():
    q = (BATCH, SHAPE.num_heads, SEQUENCE, SHAPE.head_dim)
    forward, backward = sdpa_flop_count(q, q, q), sdpa_backward_flop_count(q, q, q, q)
    layers = SHAPE.num_layers
    eager = expected()
    fused = step_flops(SHAPE, DENSE, TrainingStep(TOKENS, 0, [SEQUENCE] * BATCH, RANK))
    assert eager.forward.attention_core == layers * forward
    causal = attention_pairs([SEQUENCE]) / attention_pairs([SEQUENCE], causal=False)
    assert fused.forward.attention_core == pytest.approx(layers * forward * causal)
    assert fused.backward.attention_core == pytest.approx(layers * backward * causal)


def test_attention_pairs():
    assert attention_pairs([3, 1]) == 7
    assert attention_pairs([3, 1], causal=False) == 10


def test_parts_add_up_to_the_total():
    flops = step_flops(
        SHAPE, [(0.5, 0.5)] * 3, TrainingStep(10, 50, [20] * 3, RANK, checkpointing=True, estimator_rank=8)
    )
    assert flops.total == flops.forward.total + flops.recompute.total + flops.backward.total == flops.parts.total
    assert flops.recompute.head == 0
    assert flops.recompute.mlp_base == flops.forward.mlp_base == flops.backward.mlp_base
    assert flops.forward.estimator > 0
    assert flops.recompute.estimator == flops.backward.estimator == 0
    assert flops.parts.mlp_base == 3 * flops.forward.mlp_base


def test_micro_batches_add_up():
    def flops(dense, context, lengths):
        return step_flops(SHAPE, [(0.9, 0.5)] * 3, TrainingStep(dense, context, lengths, RANK)).total

    assert flops(10, 30, [20, 20]) + flops(5, 7, [12]) == flops(15, 37, [20, 20, 12])


def flops_ratio(shape, layers, step):
    """FLOPs of the dense step divided by those of the sparse one."""
    dense, sparse = (step_flops(shape, each, step).total for each in ([(0.0, 0.0)] * shape.num_layers, layers))
    return dense / sparse


def test_ratio():
    context_only = flops_ratio(SHAPE, [(0.9, 0.5)] * 3, TrainingStep(0, TOKENS, [SEQUENCE] * BATCH, RANK))
    mixed = flops_ratio(SHAPE, [(0.9, 0.5)] * 3, TrainingStep(TOKENS // 2, TOKENS // 2, [SEQUENCE] * BATCH, RANK))
    assert context_only > mixed > 1
    assert flops_ratio(SHAPE, DENSE, TrainingStep(0, TOKENS, [SEQUENCE], RANK, checkpointing=True)) == 1
    assert flops_ratio(SHAPE, [(0.01, 0.0)] * 3, TrainingStep(0, TOKENS, [SEQUENCE], RANK, estimator_rank=64)) < 1


@pytest.mark.parametrize(
    ("mlp", "self_attn", "narrowed"),
    [(0.0, 0.0, ("q_proj", "o_proj", *MLP)), (0.9, 0.5, ("o_proj", *MLP))],
    ids=["dense", "sparse"],
)
def test_unused_rows_of_the_last_layer(mlp, self_attn, narrowed):
    """Saved are the projections of the other rows: once forward, once for the input's gradient, LoRA's three times."""
    layers = [(0.9, 0.5), (0.9, 0.5), (mlp, self_attn)]
    options = {"attention": "eager", "estimator_rank": 8}
    dense, context, loss = 20, 40, 18
    whole, removed = (
        step_flops(
            SHAPE, layers, TrainingStep(dense, context, [SEQUENCE] * BATCH, RANK, last_layer_tokens=rows, **options)
        )
        for rows in (None, loss)
    )
    saved = 0
    sizes, chosen = SHAPE.projections(), SHAPE.projections(mlp, self_attn)
    for name in narrowed:
        (inputs, outputs), (few_inputs, few_outputs) = sizes[name], chosen[name]
        saved += 2 * 2 * ((dense - loss) * inputs * outputs + context * few_inputs * few_outputs)
        saved += 3 * 2 * (dense + context - loss) * RANK * (inputs + outputs)
    if mlp:
        saved += 2 * context * 8 * (sum(sizes["gate_proj"]) + sum(sizes["up_proj"]))
    assert whole.total - removed.total == saved
    assert whole.parts.attention_core == removed.parts.attention_core


class NaiveRemoval(NaiveSparse):
    """The same with a last layer that computes only keys and values of rows that no loss reads."""

    def __init__(self, layer_sparsity, dense_rows, estimator_rank, loss_rows):
        super().__init__(layer_sparsity, dense_rows, estimator_rank)
        self.loss = self.dense[:loss_rows]

    def densely(self, name, weights, x):
        weight, a, b = weights[name]
        return x @ weight.T + (x @ a.T) @ b.T

    def project(self, name, weights, x, channels, axis):
        if weights is self.layers[-1] and (name == "o_proj" or (name == "q_proj" and not self.layer_sparsity[-1][1])):
            y = self.densely(name, weights, x[self.loss])
            return x.new_zeros(TOKENS, y.shape[1]).index_copy(0, self.loss, y)
        return super().project(name, weights, x, channels, axis)

    def mlp(self, weights, x, sparsity):
        if weights is not self.layers[-1]:
            return super().mlp(weights, x, sparsity)
        rows = x[self.loss]
        h = torch.nn.functional.silu(self.densely("gate_proj", weights, rows)) * self.densely("up_proj", weights, rows)
        return torch.zeros_like(x).index_copy(0, self.loss, self.densely("down_proj", weights, h))


@pytest.mark.parametrize("last", [(0.0, 0.0), (0.9, 0.5)], ids=["dense", "sparse"])
@pytest.mark.parametrize("first", [(0.0, 0.0), (0.9, 0.5)], ids=["dense", "sparse"])
def test_exact_removal_against_gathered_products(first, last):
    layers = [first, first, last]
    dense, loss, rank = 30, 24, 8
    model = NaiveRemoval(layers, dense, rank, loss)
    x = torch.randn(TOKENS, SHAPE.hidden_size, requires_grad=True)
    forward, result = count(lambda: model(x, head_rows=loss))
    backward, _ = count(result.backward)
    flops = step_flops(
        SHAPE,
        layers,
        TrainingStep(
            dense,
            TOKENS - dense,
            [SEQUENCE] * BATCH,
            RANK,
            head_tokens=loss,
            last_layer_tokens=loss,
            attention="eager",
            input_requires_grad=True,
            estimator_rank=rank,
        ),
    )
    assert flops.forward.total == forward
    assert flops.backward.total == backward


def test_padding_is_left_out_of_sparse_parts_only():
    def parts(layers, **rows):
        return step_flops(
            SHAPE, layers, TrainingStep(20, rows.pop("context", 30), [SEQUENCE] * BATCH, RANK, head_tokens=0, **rows)
        ).parts

    mlps = [(0.5, 0.0)] * 3
    assert parts(mlps, padding_tokens=10).mlp_base == parts(mlps).mlp_base
    assert parts(mlps, padding_tokens=10).attention_projections == parts(mlps, context=40).attention_projections
    assert parts(DENSE, padding_tokens=10) == parts(DENSE, context=40)


class Products(TorchDispatchMode):
    """Counts matrix products, with those that write to a given tensor, which PyTorch's counter leaves out."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in ("mm", "addmm", "addmm_", "bmm"):
            left, right = args[name.startswith("addmm") :][:2]
            self.total += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize(("checkpointing", "removal"), [(False, True), (True, True), (True, False)])
def test_whole_layers_whose_backward_goes_through_few_rows(monkeypatch, checkpointing, removal):
    """By Triton's interpreter. The counts lie between those without and with LoRA, a quarter of which is in kernels.

    The product with W_down of the recomputed rows would be a quarter of the distance.
    """
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    model = peft_llama(layers=2)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert attach(model, {"backward_rows": 0.25, "exact_removal": removal}).whole_layers == 2
    get_state(model).begin_training("test", 1)
    get_state(model).set_step(0)
    ids = torch.randint(SHAPE.vocab_size, (1, SEQUENCE))
    labels = ids.clone()
    labels[:, :16] = -100
    with Products() as counted:
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    low, high = (
        step_flops(
            replace(SHAPE, num_layers=2),
            DENSE[:2],
            TrainingStep(
                5, 15, [SEQUENCE], rank, checkpointing=checkpointing, attention="eager", input_requires_grad=True,
                backward_rows=0.25, skips_output=removal, skips_down=removal,
            ),
        ).total
        for rank in (0, RANK)
    )  # fmt: skip
    assert high < 1.15 * low
    assert 0.7 < (counted.total - low) / (high - low) < 0.8


def test_published_recipe_on_llama_3_8b():
    """The aggressive recipe on 16 x 512 tokens with 128 outputs each stays below 2.50, which also skips unused rows."""
    shape = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    sparse_attention = {*range(14, 20), *range(21, 24), *range(25, 30)}
    layers = [(0.99 if 3 <= i <= 30 else 0.0, 0.75 if i in sparse_attention else 0.0) for i in range(32)]
    assert shape.projections(*layers[14])["gate_proj"] == (4096, 143)
    assert shape.projections(*layers[14])["q_proj"] == (4096, 1024)
    ratio = flops_ratio(shape, layers, TrainingStep(16 * 129, 16 * 383, [512] * 16, 16, checkpointing=True))
    assert 2.0 < ratio < 2.5


def test_shape_from_configs():
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 10,
    }
    plain = ModelShape.from_config(SimpleNamespace(**config))
    assert (plain.num_kv_heads, plain.head_dim) == (4, 16)
    gemma = ModelShape.from_config(SimpleNamespace(**config, num_key_value_heads=1, head_dim=32))
    assert (gemma.num_kv_heads, gemma.head_dim) == (1, 32)
    with pytest.raises(ConfigError, match=r"SimpleNamespace has no single integer for intermediate_size"):
        ModelShape.from_config(SimpleNamespace(**{**config, "intermediate_size": [128, 256]}))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([(0.5, 0.5)] * 2, {}, r"2 layer sparsities were given for a model of 3 layers"),
        (DENSE, {"attention": "flash"}, r"'flash'; it must be 'fused' or 'eager'"),
        (DENSE, {"lora_targets": ["q"]}, r"\['q'\]; known projections are q_proj"),
    ],
)
def test_bad_inputs(layers, options, message):
    with pytest.raises(ConfigError, match=message):
        step_flops(SHAPE, layers, TrainingStep(1, 1, [2], RANK, **options))
