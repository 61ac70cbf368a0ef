"""The records of `explain`, compared with values computed in other ways."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sparse_unsloth import attach, get_state
from sparse_unsloth.channels.calibration import energy_captured
from sparse_unsloth.channels.energy import mlp_energy
from sparse_unsloth.cli import main
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.explain import records as files
from sparse_unsloth.explain.report import markdown, summary, write
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.tokens.partition import TokenPartition

from masked_models import SHARE, chosen_rows, every_step, record_selections
from tiny_models import always, loss_and_gradients, make_batch, make_lora

SHAPE = ModelShape(64, 128, 3, 4, 2, 16, 96)


def driven(monkeypatch, max_steps=100, **changes):
    """An attached model under a driver, and the contexts of its forwards."""
    model = make_lora()
    attach(model, always(**changes))
    get_state(model).begin_training("test", max_steps)
    return model, get_state(model), record_selections(model, monkeypatch)


def step(model, state, number, *seeds):
    state.set_step(number)
    for seed in seeds or (number,):
        loss_and_gradients(model, make_batch(seed))


def test_every_forward_chooses(monkeypatch):
    model, state, contexts = driven(monkeypatch)
    step(model, state, 0, 1, 2)
    assert contexts[0].selections[0, "mlp"] is not contexts[1].selections[0, "mlp"]


# -- Observation ------------------------------------------------------------------------------------------------------


def test_records_say_what_other_ways_say(monkeypatch):
    config = {"estimator": {"kind": "svd", "rank": 4}, "explain_steps": 5, "mlp": {"1-2": 0.6}, "self_attn": {"2": 0.5}}
    model, state, contexts = driven(monkeypatch, **config)
    captured = energy_captured(
        model, state.layers, state.layer_sparsity, {"it": state.selector}, [make_batch(1)], skip_shared=False,
        progress=False,
    )["it"]  # fmt: skip
    inputs = []
    handle = state.layers[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for number in range(8):
        step(model, state, number)
    handle.remove()
    found = state.observer.take()
    assert [record["step"] for record in found] == [1, 6]
    assert state.observer.take() == []
    first = found[0]
    assert files.parts(found) == ["mlp", "self_attn"]
    for part, layers in (("mlp", {1, 2}), ("self_attn", {2})):
        assert files.values(first, part, "captured").keys() == layers
        for layer, overlap in files.values(first, part, "overlap").items():
            names = ("channels",) if part == "mlp" else ("k", "v")
            before, now = (context.selections[layer, part] for context in contexts[:2])
            shares = [torch.isin(getattr(now, name), getattr(before, name)).float().mean() for name in names]
            assert overlap == pytest.approx((sum(shares) / len(shares)).item())
            assert 0 < overlap <= 1
    # All below layer 1's MLP is dense, as in `energy_captured`.
    assert files.values(first, "mlp", "captured")[1] == pytest.approx(captured.mlp[1], abs=0.02)
    context, kept = contexts[1].partition.context, contexts[1].selections[1, "mlp"].channels
    rows = context[context % make_batch(1)["input_ids"].shape[1] != 0]
    energy = mlp_energy(state.layers[1], inputs[1].flatten(0, 1)[rows])
    share = energy[kept].sum() / energy.topk(len(kept)).values.sum()
    assert files.values(first, "mlp", "captured")[1] == pytest.approx(share.item(), rel=1e-4)
    assert files.values(first, "self_attn", "captured")[2] < 1
    partition = contexts[1].partition
    dense, sparse = (
        step_flops(SHAPE, layers, TrainingStep(partition.num_dense, partition.num_context, [], 0)).forward
        for layers in ([(0.0, 0.0)] * 3, state.layer_sparsity)
    )
    spent = (sparse.mlp_base + sparse.attention_projections) / (dense.mlp_base + dense.attention_projections)
    assert first["saved_flops"] == pytest.approx(1 - spent)
    assert first["context_share"] == partition.context_share


def test_the_oracle_captures_everything_and_a_constant_choice_stays(monkeypatch):
    model, state, _ = driven(monkeypatch, criterion="oracle", explain_steps=2)
    for number in range(2):
        step(model, state, number)
    (record,) = state.observer.take()
    assert files.parts([record]) == ["mlp", "self_attn"]
    # On all rows; the record leaves out the first of each sequence.
    assert min(files.values(record, "mlp", "captured").values()) > 0.9
    model, state, _ = driven(monkeypatch, criterion="magnitude", explain_steps=2)
    for number in range(2):
        step(model, state, number)
    (record,) = state.observer.take()
    assert set(files.values(record, "mlp", "overlap").values()) == {1.0}


def test_a_recompute_and_other_micro_batches_change_nothing():
    found = []
    for checkpointing, seeds in ((False, ()), (True, (7, 8))):
        model = make_lora()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        attach(model, always(explain_steps=4))
        state = get_state(model)
        state.begin_training("test", 100)
        for number in range(2):
            step(model, state, number, number, *seeds)
        found.append(state.observer.take())
    assert found[0] == found[1]


def test_dense_steps_and_zero_are_not_looked_at(monkeypatch):
    model, state, _ = driven(monkeypatch, explain_steps=0)
    for number in range(3):
        step(model, state, number)
    assert state.observer.take() == []
    model, state, _ = driven(monkeypatch, max_steps=10, explain_steps=1, start_step=2, end_step=4)
    for number in range(10):
        step(model, state, number)
    assert [record["step"] for record in state.observer.take()] == [3]


# -- Files, trainer, command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real trainer's folder and its log."""
    folder = tmp_path_factory.mktemp("run")
    files.append(folder, [{"step": 1, "layers": [], "of": "an earlier run"}])
    model = make_lora()
    attach(model, always(explain_steps=4))
    rows = [{name: value[0] for name, value in make_batch(seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        str(folder), max_steps=12, logging_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return folder, trainer.state.log_history


def test_the_trainer_logs_it(run):
    folder, history = run
    assert [record["step"] for record in files.read(folder)] == [1, 5, 9]
    with_it = [line for line in history if "sparsity/captured/mlp" in line]
    assert len(with_it) == 3
    record = files.read(folder)[0]
    shares = files.values(record, "mlp", "captured")
    assert with_it[0]["sparsity/captured/mlp"] == pytest.approx(sum(shares.values()) / 3)
    assert with_it[0]["sparsity/captured/mlp/layer_01"] == shares[1]
    assert with_it[0]["sparsity/overlap/self_attn/layer_02"] <= 1
    assert 0 < with_it[0]["sparsity/saved_flops"] < 1


def test_report_and_picture(run, tmp_path, capsys):
    folder, _ = run
    assert main(["explain", str(folder), "--output-dir", str(tmp_path)]) == 0
    assert "of the tokens are context" in capsys.readouterr().out
    text = (tmp_path / "explain.md").read_text()
    assert text == markdown(files.read(folder))
    assert text.count("\n| ") == 2 + 3, "heading and rule, three layers"
    assert "MLP: captured" in text
    assert (tmp_path / "explain.png").stat().st_size > 10_000
    assert main(["explain", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == files.read(folder)


def test_a_resumed_run_counts_once_and_a_cut_off_line_not(tmp_path):
    row = {"layer": 0, "part": "mlp", "captured": 0.5, "overlap": 0.25, "saved_flops": 0.1}
    record = {"step": 3, "context_share": 0.5, "saved_flops": 0.1, "layers": [row]}
    files.append(tmp_path, [record, {**record, "step": 9}, {**record, "step": 3, "context_share": 0.75}])
    with open(tmp_path / files.RECORDS_FILE, "a") as file:
        file.write('{"step": 12, "lay')
    found = files.read(tmp_path)
    assert [(each["step"], each["context_share"]) for each in found] == [(3, 0.75), (9, 0.5)]
    assert "MLP: less than 70% of the oracle" in "\n".join(summary(found))
    assert "would be stale" in write(tmp_path)


def test_folders_without_records(tmp_path, capsys):
    assert main(["explain", str(tmp_path)]) == 2
    assert "explain_steps above 0" in capsys.readouterr().err
    model = make_lora()
    attach(model, "rows")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert main(["explain", str(tmp_path)]) == 2
    assert "was trained with backward_rows, and has no explain.jsonl" in capsys.readouterr().err
    (tmp_path / files.RECORDS_FILE).write_text("no record\n{}\n")
    with pytest.raises(ConfigError, match="line 1 is no record"):
        files.read(tmp_path)
    (tmp_path / files.RECORDS_FILE).write_text("")
    with pytest.raises(ConfigError, match="no whole record"):
        files.read(tmp_path)


# -- Row sparsity: the energy of chosen rows --------------------------------------------------------------------------


def energies(model, batch):
    """``model``'s energies of chosen and of all rows by layer, from hooks on gradients; it is attached."""
    partition = TokenPartition.from_labels(batch["labels"], batch["attention_mask"])
    found, handles = {}, []

    def note(index, gradient):
        squares = gradient.flatten(0, -2).double().square().sum(-1)
        chosen = sorted(chosen_rows(gradient, partition, SHARE))
        found[index] = squares[chosen].sum().item(), squares.sum().item()

    for layer in get_state(model).layers:
        hook = lambda module, gradients, index=layer.index: note(index, gradients[0])  # noqa: E731
        handles.append(layer.mlp.register_full_backward_pre_hook(hook))
    loss_and_gradients(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_energy_is_that_of_the_gradients(checkpointing):
    model = make_lora()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    attach(model, every_step(explain_steps=2))
    state = get_state(model)
    state.begin_training("test", 100)
    sums, shares = {}, {}
    for number in range(5):
        state.set_step(number)
        for index, found in energies(model, make_batch(number)).items():
            before = sums.get(index, (0, 0))
            sums[index] = before[0] + found[0], before[1] + found[1]
        if number % 2:  # a log line
            shares = {index: chosen / everything for index, (chosen, everything) in sums.items()}
            figures = metrics(state)
            assert figures["sparsity/gradient_energy"] == pytest.approx(sum(shares.values()) / 3, rel=1e-5)
            assert figures["sparsity/gradient_energy_min"] == pytest.approx(min(shares.values()), rel=1e-5)
            sums = {}
    records = state.observer.take()
    assert [record["step"] for record in records] == [1, 3]
    assert files.values(records[-1], "rows", "gradient_energy") == pytest.approx(shares, rel=1e-5)
    assert 0.3 < min(shares.values()) < 1
    assert files.means(records[-1]) == {}
    assert state.observer.take() == []


def test_a_training_by_rows_logs_and_reports_it(tmp_path, capsys):
    model = make_lora()
    attach(model, every_step(explain_steps=3))
    rows = [{name: value[0] for name, value in make_batch(seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert all(0 < line["sparsity/gradient_energy_min"] <= line["sparsity/gradient_energy"] <= 1 for line in log)
    records = files.read(tmp_path)
    assert [record["step"] for record in records] == [0, 3]
    last = files.values(records[-1], "rows", "gradient_energy")
    assert log[3]["sparsity/gradient_energy/rows/layer_02"] == last[2]
    assert log[3]["sparsity/gradient_energy_min"] == min(last.values())
    assert "sparsity/gradient_energy/rows/layer_02" not in log[2]
    assert main(["explain", str(tmp_path)]) == 0
    assert "- chosen rows: share of the gradient's energy " in capsys.readouterr().out
    text = (tmp_path / "explain.md").read_text()
    assert "| layer | chosen rows: energy |" in text
    assert text.count("\n| ") == 2 + 3, "heading and rule, three layers"
    assert (tmp_path / "explain.png").stat().st_size > 10_000
