"""Layers that keep attention on the GPU: gradients, kernels, memory and time, with and without CUDA graphs.

    python -m pytest tests/gpu/test_kept_attention.py -s

prints what benchmarks/results/one-layer/kept_attention.md predicts: all of it decides whether
`checkpoint_planner.KEEPS_ATTENTION` becomes true.
"""

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_unsloth import detach
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE
from sparse_unsloth.runtime import checkpoint_planner

from keeping_models import attach_keeping, keep_attention_alone
from masked_models import every_step
from recorded_layers import LAYERS, RULES
from tiny_models import always, loss_and_gradients, make_batch, make_lora
from unsloth_stand_in import StandIn, packed_batch
from whole_layers import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SPARSITY = {"dense": always(**RULES["dense"]), "rows": every_step(), "channels": always(**RULES["both"])}
RUNS = [(name, graphs) for name in SPARSITY for graphs in (False, True) if graphs or name != "dense"]
"""Dense layers run as a whole in CUDA graphs alone."""
FORWARD = ("flash_fwd", "fprop", "fmha_cutlassf")
"""In the names of attention's forward kernels: FlashAttention, cuDNN, the memory-efficient one."""
STEPS = RUNS_BEFORE_CAPTURE + 3
TOKENS, LARGE_LAYERS = 16384, 6
LARGE = {
    "vocab_size": 1024, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": LARGE_LAYERS,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": TOKENS, "use_cache": False,
}  # fmt: skip
"""Llama-3-8B's layers."""
NEARLY_EQUAL, OTHER_ROWS = 0.01, 0.05
"""Attention's backward adds in no fixed order, and rows of nearly equal gradients change places. A kernel that gives
the logarithms too may round otherwise: cuDNN has a plan for each."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    keep_attention_alone(monkeypatch)


def error(ours, expected):
    apart = sum((ours[name] - expected[name]).float().square().sum() for name in expected)
    return (apart / sum(values.float().square().sum() for values in expected.values())).sqrt().item()


def forward_kernels(model, batch):
    """How often a forward kernel of attention runs in a step; replays of CUDA graphs show their kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss_and_gradients(model, batch)
        torch.cuda.synchronize()
    names = [(event.key.lower(), event.count) for event in profile.key_averages()]
    return sum(count for name, count in names if any(part in name for part in FORWARD))


def both_ways(monkeypatch, model, sparsity, batch, measure, **changes):
    """``measure(model, state)`` after some steps, without keeping attention and with it."""
    found = []
    for keeps in (False, True):
        monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", keeps)
        state = attach_keeping(model, sparsity, **changes)
        for _ in range(STEPS):
            loss_and_gradients(model, batch)
        assert bool(state.planner.attention_kept) == keeps
        found.append(measure(model, state))
        detach(model)
        torch.cuda.empty_cache()
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize(("sparsity", "graphs"), RUNS)
def test_gradients_and_kernels(monkeypatch, sparsity, kind, packed, graphs):
    model = make_model(StandIn(monkeypatch), kind, num_hidden_layers=LAYERS).to("cuda", torch.bfloat16)
    made = (packed_batch if packed else make_batch)(seed=1, lengths=((160, 40), (130, 25)))
    batch = {name: values.cuda() for name, values in made.items()}

    def measure(model, state):
        outcome = loss_and_gradients(model, batch)
        assert state.counts.captured_layers == LAYERS * graphs
        return *outcome, forward_kernels(model, batch)

    (loss, gradients, calls), (ours, our_gradients, our_calls) = both_ways(
        monkeypatch, model, SPARSITY[sparsity], batch, measure, cuda_graphs=graphs
    )
    apart = error(our_gradients, gradients)
    print(f"{sparsity}, {kind}: gradients {apart:.1e} apart, {calls} and {our_calls} forward kernels")
    assert ours.item() == pytest.approx(loss.item(), rel=1e-3)
    assert apart <= (OTHER_ROWS if sparsity == "rows" else NEARLY_EQUAL)
    assert (calls, our_calls) == (2 * LAYERS, LAYERS)


@pytest.fixture(scope="module")
def large():
    """Layers of an 8B in bf16, checkpointed, with PyTorch's attention."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = LlamaForCausalLM(LlamaConfig(**LARGE, attn_implementation="sdpa")).to(torch.bfloat16)
    model = make_lora(base=base).to("cuda", torch.bfloat16)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(3, 1000, (1, TOKENS), device="cuda")
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    return model, {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("sparsity", "graphs"), [("dense", True), ("rows", False), ("rows", True)])
def test_memory_and_time_of_a_long_document(monkeypatch, large, sparsity, graphs):
    """As forecast, and less time: 8 % of a dense step are predicted, and more of one by rows."""
    model, batch = large

    def measure(model, state):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradients(model, batch)
        peak, times = torch.cuda.max_memory_allocated(), []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            model(**batch).loss.backward()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        calls = forward_kernels(model, batch)
        return peak, statistics.median(times), calls, state.planner.memory.attention(TOKENS)

    given = model, SPARSITY[sparsity], batch, measure
    (peak, before, calls, one), (more, after, our_calls, _) = both_ways(monkeypatch, *given, cuda_graphs=graphs)
    name = f"{sparsity}, {'captured' if graphs else 'uncaptured'}, {LARGE_LAYERS} layers of {TOKENS} tokens"
    print(f"{name}: {before:.1f} ms, keeping {after:.1f} ms, {before / after:.3f}x; kernels {calls} and {our_calls}")
    print(f"{name}: {(more - peak) / one:.2f} times {one / 2**20:.0f} MiB more at the peak")
    assert (calls, our_calls) == (2 * LARGE_LAYERS, LARGE_LAYERS)
    # The last layer's recompute needs no output of its own; captured, one copy is the recompute's input.
    assert LARGE_LAYERS - 1.5 <= (more - peak) / one <= LARGE_LAYERS + 1.5
    assert after < 0.97 * before
