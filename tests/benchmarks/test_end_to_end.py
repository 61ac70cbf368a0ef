"""Tests end-to-end runs: the data's lengths, a cell on a CPU, resuming, tables, what each arm changes."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sparse_unsloth.bench.processes import Parent
from sparse_unsloth.bench.table import read_table
from sparse_unsloth.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


text = load("real_text")
plots = load("plot_end_to_end")
runs = load("end_to_end")


@pytest.fixture(scope="module")
def tokenizer():
    return text.make_tokenizer()


@pytest.mark.parametrize("kind", list(text.KINDS))
def test_data_have_the_lengths_and_the_context_share_of_their_kind(kind, tokenizer):
    count = 4 if kind == "long16k" else 64
    rows = text.make_rows(kind, tokenizer, count)
    for what, found, target in text.describe(kind, rows, tokenizer):
        assert found == pytest.approx(target, rel=0.1), what
    assert text.make_rows(kind, tokenizer, count) == rows
    assert text.make_rows(kind, tokenizer, count, seed=1) != rows
    words = " ".join(row["completion"][0]["content"] for row in rows).split()
    assert len(set(words)) > 200
    assert {"the", "return"} & set(words), "no real text"


def test_data_are_the_same_in_every_process():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import real_text
class Letters:
    chat_template = "some"
    encode = staticmethod(lambda text, add_special_tokens: list(text))
    decode = staticmethod(lambda ids, clean_up_tokenization_spaces: "".join(ids))
real_text.corpus = lambda: {name: [f"{name} {at}" for at in range(99)] for name in ("prose", "code")}
print([real_text.make_rows(kind, Letters, 9) for kind in ("chat", "passages", "long-prompts")])
"""
    texts = [
        subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], env={"PYTHONHASHSEED": seed}, capture_output=True,
                       text=True, check=True).stdout for seed in "123"
    ]  # fmt: skip
    assert len(set(texts)) == 1


def test_a_cell_of_ours_and_of_plain_peft_train_alike(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "make_tokenizer", lambda: tokenizer)
    found, seen, make_clock = [], [], runs.make_clock
    monkeypatch.setattr(runs, "emit", lambda **report: found.append(report))

    def watch(trainer, *steps):
        trainer.model.register_forward_pre_hook(
            lambda _, args, batch: seen[-1].append(int(batch["attention_mask"].sum())), with_kwargs=True
        )
        seen.append([])
        return make_clock(trainer, *steps)

    monkeypatch.setattr(runs, "make_clock", watch)
    words = ["--backend", "peft", "--model", "tiny", "--work", str(tmp_path), "--data", "chat", "--steps", "3"]
    words += ["--micro-batches", "1x2", "--warmup", "1", "--profile", "1"]
    for number, arm in enumerate(("peft", "ours-exact+no-checkpointing")):
        args = runs.parse([*words, "--arms", arm])
        runs.prepare(args)
        assert ("context share" in capsys.readouterr().out) == (number == 0), "data are made once"
        runs.measure_cell(args)
    rows = [json.loads(line) for line in runs.data_path(args, "chat").read_text().splitlines()]
    assert len(rows) == 8
    sizes = [text.token_counts(row, tokenizer)[1] for row in rows]
    for report, arm in zip(found, ("peft", "ours-exact+no-checkpointing"), strict=True):
        row, curve = report["row"], report["curve"]
        assert (row["arm"], row["micro_batch"], row["busy_share"]) == (arm, "1x2", None)
        assert curve["tokens"] == [sum(sizes[at : at + 2]) for at in (0, 2, 4)]
        assert row["tokens_per_s"] == pytest.approx(sum(sizes[2:6]) / sum(curve["step_s"][1:]), rel=0.1)
        assert sum(curve["step_s"]) == pytest.approx(row["total_s"], rel=0.1)
        assert row["final_loss"] == pytest.approx(curve["losses"][-1], abs=1e-3)
        assert row["peak_gib"] > 0
    assert seen == [sizes, sizes], "another order"
    assert found[0]["curve"]["losses"] == pytest.approx(found[1]["curve"]["losses"], abs=2e-3)
    assert len(found[0]["curve"]["losses"]) == 3


def test_a_job_resumes_and_compares_with_the_stock_and_the_best_arm(tmp_path, monkeypatch, capsys):
    started, prepared_for, speeds = [], [], {"unsloth-stock": 100, "unsloth-padded": 150, "ours-exact": 300}
    monkeypatch.setattr(runs, "why_not_installed", lambda arm: None)
    monkeypatch.setattr(runs, "prepare_elsewhere", prepared_for.append)
    monkeypatch.setattr(runs, "processor", lambda: "A CPU")

    def run(self, process, command, take):
        args = runs.parse([*command[2:], *process.words()])
        (piece,) = runs.cells_of(args)
        started.append((piece["micro_batch"], piece["arm"], process.env.get("UNSLOTH_BLOCK_CUDAGRAPHS")))
        if piece["arm"] == "unsloth-kept":
            return "RuntimeError: broken"
        if len(started) == 3:
            self.stopped = "the time is up"
            return None
        speed = speeds[piece["arm"]] * (2 if piece["micro_batch"] == "8x1" else 1)
        figures = {"tokens_per_s": speed, "total_s": 9, "busy_share": None, "peak_gib": 5.0, "final_loss": 2.5}
        take({"row": piece | figures | {"note": "a | b"}, "curve": {"losses": [3.0, 2.5], "tokens": [9, 9]}})
        return None

    monkeypatch.setattr(Parent, "run", run)
    out = tmp_path / "cells.csv"
    words = ["--out", str(out), "--arms", "unsloth-stock,ours-exact,unsloth-padded,unsloth-kept", "--data", "chat"]
    assert runs.main(words) == 1
    assert "stopped, the time is up: 6 cells are left" in capsys.readouterr().out
    assert runs.main(words) == 1, "one arm failed"
    cells = [(micro, arm) for micro in ("2x4", "8x1") for arm in runs.parse(words).arms]
    assert [one[:2] for one in started] == [*cells[:3], *cells[2:]]
    assert prepared_for == [words] * 2
    printed = capsys.readouterr().out
    assert "| chat | 2x4 | ours-exact | 300 | 3.00x | 2.00x | unsloth-padded | 1.00x |  | 5.0 | 2.5 |" in printed
    assert "| chat | 8x1 | unsloth-stock | 200 | 1.00x | 0.67x | unsloth-padded | 0.67x |  | 5.0 | 2.5 |" in printed
    assert "| chat | 8x1 | unsloth-kept |  |  |  |  |  |  |  |  |  | failed: RuntimeError: broken |" in printed
    rows = read_table(out, plots.COLUMNS)
    assert (len(rows), len({row["run"] for row in rows})) == (8, 1)
    assert runs.main(["--out", str(out), "--table"]) == 0
    assert "| ours-exact | 600 | 3.00x | 2.00x |" in capsys.readouterr().out
    assert runs.main(["--out", str(out), "--plot"]) == 0
    pictures = capsys.readouterr().out.split()
    assert [Path(name).name for name in pictures] == ["cells.png", "cells-losses.png"]
    assert all(Path(name).stat().st_size > 1000 for name in pictures)


def test_an_arm_changes_only_what_it_means():
    entry = runs.entry_of("ours-exact+no-checkpointing", "unsloth")
    stock, padded, graphs, kept = (runs.entry_of(f"unsloth-{name}", "unsloth") for name in
                                   ("stock", "padded", "graphs", "kept"))  # fmt: skip
    assert (entry.ours, stock.ours) == (True, False)
    assert entry.sparsity == {"preset": "dense", "cuda_graphs": torch.cuda.is_available()}
    assert runs.entry_of("ours-auto", "unsloth").sparsity == {"preset": "auto"}
    assert (dict(entry.arm.lora), dict(stock.arm.lora)) == ({"use_gradient_checkpointing": False}, {})
    assert dict(kept.arm.lora) == {"checkpoint_skip_layers": "max"}
    assert (dict(graphs.arm.env), dict(padded.arm.env)) == ({"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}, {})
    of = {one: runs.settings_of(one_entry, "chat", 2, 4, 9, "f") for one, one_entry in
          {"stock": stock, "padded": padded, "graphs": graphs, "kept": kept, "ours": entry}.items()}  # fmt: skip
    assert of["kept"] == of["stock"]
    assert of["padded"] == of["graphs"] == of["stock"] | {"padding_free": False}
    assert of["ours"] == of["stock"] | {"gradient_checkpointing": False}
    for name, backend, why in (
        ("unsloth-quick", "unsloth", "no arm quick"),
        ("unsloth-stock", "peft", "no arm unsloth-stock with --backend peft"),
        ("peft", "unsloth", "no arm peft with --backend unsloth"),
        ("unsloth-peft", "unsloth", "no arm unsloth-peft with --backend unsloth"),
    ):
        with pytest.raises(ConfigError, match=why):
            runs.entry_of(name, backend)
    for words, why in ((["--data", "chats"], "chats"), (["--micro-batches", "8"], "2x4"), (["--warmup", "30"], "30")):
        with pytest.raises(ConfigError, match=why):
            runs.parse(words)


def test_a_long_document_is_a_micro_batch():
    args = Namespace(model="m", dtype="4bit", steps=3, warmup=1, data=["code", "long16k"], micro_batches=["2x4", "8x1"],
                     arms={"unsloth-stock": None}, profile=1, work=Path("w"))  # fmt: skip
    assert [(cell["data"], cell["micro_batch"]) for cell in runs.cells_of(args)] == [
        ("code", "2x4"), ("code", "8x1"), ("long16k", "1x1"),
    ]  # fmt: skip
    assert [runs.data_path(args, kind).name for kind in args.data] == ["m-code-32.jsonl", "m-long16k-4.jsonl"]


def test_kernels_of_profiled_steps_against_the_time_without_the_profiler():
    def event(name, start, end, device=torch.autograd.DeviceType.CUDA):
        times = Namespace(start=start * 1e6, end=end * 1e6)
        return Namespace(name=name, time_range=times, device_type=device, is_user_annotation=name == "step")

    kernels = [event("gemm", 0, 2), event("rope", 1, 3)]
    others = [event("step", 0, 9), event("Memcpy HtoD", 0, 9), event("aten::mm", 0, 9, torch.autograd.DeviceType.CPU)]
    clock = Namespace(profile=Namespace(events=lambda: kernels + others))
    assert runs.busy_share(clock, tokens=100, speed=10) == 0.3  # 0.03 s of kernels a token, 0.1 s a token
    assert runs.busy_share(clock, tokens=100, speed=50) == 1.0
    assert runs.busy_share(Namespace(profile=Namespace(events=lambda: others)), 100, 10) is None
    assert runs.busy_share(Namespace(profile=None), 100, 10) is None


def test_unsloth_comes_before_our_import(monkeypatch):
    imported, unsloth, load_module = [], Namespace(FastLanguageModel="Unsloth's"), importlib.import_module

    def import_module(name, *others):
        imported.append(name)
        return unsloth if name == "unsloth" else load_module(name, *others)

    monkeypatch.setattr(importlib, "import_module", import_module)
    stock, ours = (runs.entry_of(name, "unsloth") for name in ("unsloth-stock", "ours-exact"))
    assert (runs.library_of(stock), imported) == ("Unsloth's", ["unsloth"])
    assert runs.library_of(ours).from_pretrained.keywords == {"backend": "unsloth"}
    assert imported[1] == "unsloth"
    assert len(imported) > 2
    assert runs.library_of(runs.entry_of("peft", "peft")) is runs.PlainPeft
    assert runs.library_of(runs.entry_of("ours-exact", "peft")).from_pretrained.keywords == {"backend": "peft"}
    assert imported.count("unsloth") == 2
