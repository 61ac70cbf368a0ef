"""The Unsloth backend on the GPU: against plain Unsloth, and against the PEFT backend.

Run by ``make test-gpu``. Each backend runs in a process of its own (`compare_backends.py`); outcomes are compared here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SCRIPT = Path(__file__).parent / "compare_backends.py"


# Unsloth compiles attention for Gemma2: in a process of its own, beside the others.
RUNS = (("peft", "llama"), ("unsloth", "llama,mistral,qwen2,qwen3,gemma"), ("unsloth", "gemma2"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    from sparse_unsloth.bench.families import families_of, write_models

    write_models(folder, families_of("unsloth"))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
    }
    processes = []
    for number, (backend, families) in enumerate(RUNS):
        command = [sys.executable, str(SCRIPT), backend, str(folder), str(folder / f"{number}.pt"), families]
        log = (folder / f"{number}.log").open("w")
        place = folder / f"run{number}"  # Unsloth writes its compiled modules into the working directory
        place.mkdir()
        processes.append(subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT))
    results = {"peft": {}, "unsloth": {}, "prefill": {}}
    for number, process in enumerate(processes):
        code = process.wait(timeout=500)
        text = (folder / f"{number}.log").read_text()
        print("\n".join(line for line in text.splitlines() if " loss " in line))
        assert code == 0, text[-6000:]
        outcome = torch.load(folder / f"{number}.pt")
        results[RUNS[number][0]] |= outcome["steps"]
        results["prefill"] |= outcome["prefill"]
    return results


def error(ours, reference):
    """Relative error of all gradients taken together, and of the worst single one."""
    assert ours.keys() == reference.keys()
    total = sum((ours[n] - reference[n]).square().sum() for n in ours) / sum(
        r.square().sum() for r in reference.values()
    )
    worst = max((ours[n] - reference[n]).norm() / reference[n].norm().clamp_min(1e-8) for n in ours)
    return total.sqrt().item(), worst.item()


FEW_ROWS = 0.15
"""Relative error of gradients through few rows: rounding decides between rows of nearly equal gradient."""
SAME = {"nothing-dropped": "plain", "exact-removal": "plain", "every row": "plain", "sparse": "sparse, all rows"}
"""Settings that must come out alike."""


@pytest.mark.parametrize("setting", SAME)
def test_settings_that_change_nothing(outcomes, setting):
    compared = 0
    for (family, dtype, mode, sparsity, layout), ours in outcomes["unsloth"].items():
        if sparsity != setting:
            continue
        plain = outcomes["unsloth"][family, dtype, mode, SAME[setting], layout]
        total, worst = error(ours["gradients"], plain["gradients"])
        losses = f"loss {ours['loss']:.5f} / {plain['loss']:.5f}"
        print(f"{setting} {family} {dtype} {mode} {layout}: {losses}; {total:.2e} {worst:.2e}")
        assert ours["loss"] == pytest.approx(plain["loss"], rel=2e-3)
        assert total < 0.03, (family, dtype, mode, layout)
        compared += 1
    assert compared == 6 * 2 + 4 * 2 + 1


def test_sparse_equals_the_peft_backend(outcomes):
    compared = 0
    for (family, dtype, mode, sparsity, layout), peft in outcomes["peft"].items():
        for other in [m for m in (False, True, "unsloth") if bool(m) == bool(mode)]:
            ours = outcomes["unsloth"][family, dtype, other, sparsity, layout]
            total, worst = error(ours["gradients"], peft["gradients"])
            losses = f"loss {ours['loss']:.5f} / {peft['loss']:.5f}"
            print(f"{sparsity} {family} {dtype} {other} {layout}: {losses}; {total:.2e} {worst:.2e}")
            assert ours["loss"] == pytest.approx(peft["loss"], rel=2e-3)
            assert total < (0.03 if sparsity == "sparse" else FEW_ROWS)
            compared += 1
    assert compared == 2 * 6  # each dtype: without checkpointing, and with it in Unsloth's two ways


def test_sparsity_does_something_and_checkpointing_changes_nothing(outcomes):
    runs = outcomes["unsloth"]
    for dtype in ("bf16", "4bit"):
        for layout in ("padded", "packed"):
            reference = runs["llama", dtype, False, "sparse", layout]
            assert abs(reference["loss"] - runs["llama", dtype, False, "plain", layout]["loss"]) > 1e-3
            for mode in (True, "unsloth"):
                total, _ = error(runs["llama", dtype, mode, "sparse", layout]["gradients"], reference["gradients"])
                assert total < 5e-3, (dtype, layout, mode)


def test_packed_and_padded_agree(outcomes):
    runs = outcomes["unsloth"]
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        padded, packed = (runs[family, "bf16", "unsloth", "sparse", layout] for layout in ("padded", "packed"))
        assert packed["loss"] == pytest.approx(padded["loss"], rel=5e-3), family


@pytest.mark.parametrize("dtype", ["bf16", "4bit"])
def test_sparse_prefill_equals_the_peft_backend(outcomes, dtype):
    logits = {key[::3]: value for key, value in outcomes["prefill"].items() if key[1:3] == ("llama", dtype)}
    for sparse in (False, True):
        ours, peft = logits["unsloth", sparse], logits["peft", sparse]
        assert ((ours[0] - peft[0]).norm() / peft[0].norm()).item() < 0.03, (dtype, sparse)
    assert ((logits["unsloth", True] - logits["unsloth", False]).norm() / peft.norm()).item() > 0.01
