"""Which layers the planner lets keep attention, and the bytes that it counts for them."""

from dataclasses import replace
from math import inf

import pytest
import torch

from sparse_unsloth import attach, get_state
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import GIB, Forward, StepMemory
from sparse_unsloth.runtime import checkpoint_planner
from sparse_unsloth.runtime.checkpoint_planner import counted
from sparse_unsloth.tokens.batch import read_batch

from tiny_models import make_base, make_batch, make_lora

LLAMA_3_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
BUDGET, ROWS, LAYERS = 2.0, 4096, 3


@pytest.fixture
def planner(monkeypatch):
    """Of a model whose layers ran as a whole."""
    monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", True)
    model = make_lora(base=make_base(use_cache=False))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    attach(model, {"backward_rows": 0.25, "memory_budget": BUDGET})
    state = get_state(model)
    state.begin_training("test", max_steps=1)
    planner = state.planner
    planner._row_layers = dict.fromkeys(range(LAYERS), True)
    for index in range(LAYERS):
        planner.note_whole(index, None)
    return planner


def leave(monkeypatch, planner, count):
    """Leaves so many bytes for what layers may keep."""
    partition = counted(ROWS, 0, 0, ROWS)
    others = planner._future_bytes + planner._other_bytes(partition, ROWS, LAYERS, 1.0)
    monkeypatch.setattr(checkpoint_planner, "allocated", lambda device: int(BUDGET * GIB - others - count))
    return partition


def test_it_is_off():
    assert not checkpoint_planner.KEEPS_ATTENTION, "true when a GPU has measured it: see its docstring"


def test_attention_first_then_layers(planner, monkeypatch):
    """Its bytes are those of a layer that keeps everything, too."""
    attention = planner.memory.attention(ROWS)
    partition = leave(monkeypatch, planner, 0)
    every = planner._needs(0, partition, ROWS, 1.0)[-1]
    assert attention == ROWS * 4 * (16 * 4 + 4)
    assert 0 < attention < every / 5
    last = LAYERS - 1
    for room, kept, alone in (
        (attention - 10, set(), set()),
        (attention + 10, set(), {last}),
        (LAYERS * attention + 10, set(), {0, 1, 2}),
        ((LAYERS - 1) * attention + every + 10, {last}, {0, 1}),
        (LAYERS * every + 10, {0, 1, 2}, set()),
    ):
        leave(monkeypatch, planner, room)
        planner.plan(partition, 1.0, document=ROWS)
        off = [index for index, layer in enumerate(planner._layers) if not layer.module.gradient_checkpointing]
        assert (set(off), planner.num_kept, planner.attention_kept) == (kept, len(kept), alone)
        number, forward = planner.forecast(partition, 1.0, document=ROWS)
        assert (number, forward.kept, forward.attention_kept) == (len(kept), len(kept), len(alone))
    leave(monkeypatch, planner, LAYERS * attention + 10)
    planner.plan(partition, 1.0, document=ROWS)
    assert planner.attention_kept
    planner.restore()
    assert not planner.attention_kept


def test_where_it_cannot_or_may_not(planner, monkeypatch):
    partition = leave(monkeypatch, planner, LAYERS * planner.memory.attention(ROWS) + 10)

    def kept(scale=1.0, document=ROWS):
        planner.plan(partition, scale, document=document)
        return planner.attention_kept

    assert kept() == {0, 1, 2}
    assert kept(document=0) == set(), "not known"
    assert kept(scale=0.0) == set(), "dense layers run their own forward"
    planner.note_whole(1, None, keeps=False)
    planner.note_whole(1, None)
    assert kept() == {0, 2}, "one that found nothing to keep"
    monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", False)
    assert kept() == set()


def test_long_documents_alone(planner):
    """From 3,362 tokens in an 8B; a window counts as a document of twice its length."""
    planner._shape = LLAMA_3_8B
    pays = [planner._pays_to_keep(tokens / 2) for tokens in (512, 2048, 3360, 3364, 16384)]
    assert pays == [False, False, False, True, True]
    planner.note_whole(0, 1024)
    assert planner._attention_reach == {0: 1024, 1: inf, 2: inf}


def test_the_length_of_documents():
    batch = make_batch(lengths=((9, 4), (5, 6), (7, 2)))
    assert read_batch(batch).document_length == 13
    packed = {"input_ids": torch.ones(1, 60), "packed_seq_lengths": torch.tensor([10, 20, 30])}
    assert read_batch(packed).document_length == 20
    by_positions = {"input_ids": torch.ones(1, 60), "position_ids": torch.arange(60)[None] % 20}
    assert read_batch(by_positions).document_length == 60


def test_the_memory_of_a_step_counts_it():
    """130 MiB a layer at 16,384 tokens; captured, one copy more is the recompute's input."""
    memory, rows = StepMemory(LLAMA_3_8B, in_4bit=True, offloads=True), 16384
    assert memory.attention(rows) == 130 * 2**20
    without = Forward(rows, 0.0, 0.0, 0, 32, 2.0 * GIB)
    keeping = replace(without, attention_kept=32)
    assert memory.peak([keeping]) - memory.peak([without]) == 32 * memory.attention(rows)
    assert memory.replayed(keeping) - memory.replayed(without) == 33 * memory.attention(rows)
