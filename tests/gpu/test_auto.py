"""Preset `auto` through Unsloth on the GPU: what it chooses for short and long batches, that it is captured, and exact.

Run by ``make test-gpu``. Unsloth patches its process for good, so the models train in a process of their own: this
file, as a script.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SHAPES = {"short": (2, 96, 0.2), "long": (8, 2048, 0.9), "plain": (2, 96, 0.2)}
"""Sequences, tokens of each, and the share of context."""
STEPS = 5
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
"""Sizes of which long batches keep the GPU busy longer than its host."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    from sparse_unsloth.bench.families import write_models

    folder = tmp_path_factory.mktemp("auto")
    write_models(folder, ["llama"], device="cuda", **LARGE)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(folder / "llama"), str(folder / "out.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((folder / "out.json").read_text())


def test_short_batches_are_exact_and_captured(runs):
    short = runs["short"]
    assert (short["backward_rows"], short["cuda_graphs"]) == (1.0, True)
    assert short["captured_layers"] >= short["layers"] - 1, "the last layer may skip unused rows instead"


def test_exact_training_has_the_losses_of_plain_training(runs):
    assert runs["plain"]["cuda_graphs"] is False
    assert runs["short"]["losses"] == pytest.approx(runs["plain"]["losses"], rel=5e-3)
    assert runs["short"]["losses"][-1] < runs["short"]["losses"][0]


def test_long_prompts_are_trained_by_rows(runs):
    assert runs["long"]["backward_rows"] == 0.25
    assert runs["long"]["sparse_forwards"] == STEPS


def test_layers_keep_their_activations_where_memory_allows(runs):
    assert {name: runs[name]["kept"] for name in ("short", "long")} == {"short": 4, "long": 4}
    assert 0 < runs["short"]["memory_budget"] < 1


def test_the_table_is_printed_once_with_times_and_memory(runs):
    for name in ("short", "long"):
        assert runs[name]["table"].count("predicted: ") == 1
        assert "ms a micro-batch" in runs[name]["table"]
        assert "GiB at the peak" in runs[name]["table"]


# -- In a process of its own ------------------------------------------------------------------------------------------


def train(folder, name):
    """Some steps on one batch; what was chosen, and the losses."""
    import contextlib
    import io

    from sparse_unsloth import FastSparseLanguageModel, get_state

    count, length, context = SHAPES[name]
    model, _ = FastSparseLanguageModel.from_pretrained(
        folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False, backend="unsloth"
    )
    options = {"sparsity": None} if name == "plain" else {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model = FastSparseLanguageModel.get_peft_model(
            model, r=8, use_gradient_checkpointing="unsloth", random_state=0, **options
        )
        FastSparseLanguageModel.for_training(model)
        torch.manual_seed(0)
        ids = torch.randint(4, 1024, (count, length), device="cuda")
        labels = ids.clone()
        labels[:, : round(context * length)] = -100
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(STEPS):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(said.getvalue())
    state = get_state(model)
    return {
        "losses": losses,
        "layers": len(state.layers),
        "kept": None if state.planner is None else state.planner.num_kept,
        "captured_layers": state.counts.captured_layers,
        "sparse_forwards": state.counts.sparse_forwards,
        "table": said.getvalue(),
        **{key: getattr(state.config, key) for key in ("backward_rows", "cuda_graphs", "memory_budget")},
    }


if __name__ == "__main__":
    import unsloth  # noqa: F401 - first, as it asks

    outcome = {each: train(sys.argv[1], each) for each in SHAPES}
    Path(sys.argv[2]).write_text(json.dumps(outcome))
