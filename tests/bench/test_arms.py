"""Tests Unsloth's arms: what each sets, which share a process, and the notes on what ran."""

import argparse
import ast
import importlib.util
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from sparse_unsloth import get_state
from sparse_unsloth.bench import arms, models
from sparse_unsloth.bench.arms import (
    ARMS,
    DEFAULT_ARMS,
    PADDED,
    arm_notes,
    arm_of,
    arms_of,
    replan_arm,
    why_not_installed,
    why_unavailable,
)
from sparse_unsloth.bench.processes import processes_of
from sparse_unsloth.bench.runs import pieces_of
from sparse_unsloth.cli import bench
from sparse_unsloth.errors import ConfigError

from tiny_models import make_lora, save_checkpoint


def test_each_arm_sets_what_unsloth_reads():
    found = arms_of(DEFAULT_ARMS["unsloth"])
    assert list(found) == [
        "stock", "padded", "block-graphs", "skip-max", "skip-auto", "no-checkpointing", "padded+no-checkpointing"
    ]  # fmt: skip
    assert {name: dict(arm.env) for name, arm in found.items() if arm.env} == {
        "block-graphs": {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    }
    assert {name: dict(arm.lora) for name, arm in found.items() if arm.lora} == {
        "skip-max": {"checkpoint_skip_layers": "max"},
        "skip-auto": {"checkpoint_skip_layers": "auto"},
        "no-checkpointing": {"use_gradient_checkpointing": False},
        "padded+no-checkpointing": {"use_gradient_checkpointing": False},
    }
    padded = [name for name, arm in found.items() if arm.layout == PADDED]
    assert padded == ["padded", "block-graphs", "padded+no-checkpointing"]


def test_arms_are_joined():
    joined = arm_of("block-graphs+no-checkpointing")
    assert (joined.layout, joined.env, joined.lora) == (
        PADDED, {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}, {"use_gradient_checkpointing": False}
    )  # fmt: skip
    assert joined.needs == ARMS["block-graphs"].needs
    assert arms_of("") == {}
    with pytest.raises(ConfigError, match="there is no arm quick; arms are stock, padded"):
        arms_of("stock,quick")
    with pytest.raises(ConfigError, match="checkpoint_skip_layers to different values do not go together"):
        arm_of("skip-max+skip-auto")
    joined = arm_of("liger+no-checkpointing")
    assert (joined.backend, joined.liger, joined.lora) == ("peft", True, {"use_gradient_checkpointing": False})
    with pytest.raises(ConfigError, match="do not go together with what Unsloth alone can do"):
        arm_of("peft+skip-max")


def test_arms_of_peft_have_processes_and_rows_of_their_own():
    args = bench.parse(["--model", "m", "--backend", "peft", "--shapes", "host", "--methods", "dense,rows-25"])
    found = processes_of([*args.arms, "liger+no-checkpointing"], args.methods)
    assert [(one.arms, one.methods) for one in found] == [
        (("liger",), ()),
        ((), ("peft-dense-exact", "peft-rows-25")),
        (("peft",), ()),
        (("liger+no-checkpointing",), ()),
    ]
    rows = [(row["arm"], row["method"], row["layout"]) for row in pieces_of(args, [{}])]
    assert rows == [
        ("liger", "peft-dense", PADDED), ("peft", "peft-dense", PADDED), ("", "peft-dense-exact", PADDED),
        ("", "peft-rows-25", PADDED),
    ]  # fmt: skip


def test_an_arm_of_peft_is_loaded_without_unsloth(monkeypatch, tmp_path):
    from transformers.integrations import liger

    monkeypatch.setitem(sys.modules, "unsloth", None)  # importing it fails
    patched = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, config: patched.append(model))
    checkpoint = save_checkpoint(tmp_path)
    args = argparse.Namespace(model=checkpoint, dtype="bf16", rank=4, checkpointing="False")
    for name, checkpointing in (("peft", True), ("liger", True), ("liger+no-checkpointing", False)):
        model = models.load_arm(args, arm_of(name), 64)
        assert model.get_base_model().is_gradient_checkpointing == checkpointing
        assert get_state(model) is None
        assert arm_notes(arm_of(name), model) == "attention sdpa"
        assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_" in name)
        assert patched == ([] if name == "peft" else [model])
        patched.clear()


def test_arms_that_need_the_same_share_a_process():
    methods = ["rows-25", "peft-dense", "dense-graphs"]
    found = processes_of([*arms_of(DEFAULT_ARMS["unsloth"])], methods)
    assert [(one.arms, one.methods) for one in found] == [
        (("stock", "padded"), ()),
        ((), ("rows-25", "dense-graphs")),
        ((), ("peft-dense",)),
        (("block-graphs",), ()),
        (("skip-max",), ()),
        (("skip-auto",), ()),
        (("no-checkpointing", "padded+no-checkpointing"), ()),
    ]
    users = dict.fromkeys(("UNSLOTH_BLOCK_COMPILE_LEGACY", "UNSLOTH_GC_KEEP_LAYERS", "UNSLOTH_BLOCK_CUDAGRAPHS"), "1")
    users |= {"PATH": "p", "UNSLOTH_DISABLE_STATISTICS": "1"}
    stock, graphs, ours = (found[place].environment(users) for place in (0, 3, 1))
    assert stock == {"PATH": "p", "UNSLOTH_DISABLE_STATISTICS": "1"}
    assert graphs == stock | {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    assert ours == users


def test_an_arm_that_this_unsloth_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama.py").write_text("def get_peft_model(model, r=16): ...")
    monkeypatch.setattr(arms, "version_of", lambda package: "2026.10.6")
    monkeypatch.setattr(arms.importlib.util, "find_spec", lambda name: None)
    assert {name: why_not_installed(arm_of(name), tmp_path) for name in ARMS} == {
        "stock": None,
        "padded": None,
        "block-graphs": "not there: Unsloth 2026.10.6 has no UNSLOTH_BLOCK_CUDAGRAPHS",
        "skip-max": "not there: Unsloth 2026.10.6 has no checkpoint_skip_layers",
        "skip-auto": "not there: Unsloth 2026.10.6 has no checkpoint_skip_layers",
        "no-checkpointing": None,
        "liger": "not there: liger-kernel is not installed (pip install liger-kernel)",
        "peft": None,
    }
    assert why_not_installed(arm_of("stock")) == "not there: Unsloth is not installed"


def test_graphs_without_compiled_layers_are_no_arm(monkeypatch):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x

    model = torch.nn.Sequential(Layer())
    assert why_unavailable(arm_of("padded"), model) is None
    assert why_unavailable(arm_of("block-graphs"), model).startswith(
        "not there: Unsloth compiles no layer here (torch "
    )
    monkeypatch.setattr(Layer.forward, "_unsloth_block_compiled", True, raising=False)
    assert why_unavailable(arm_of("block-graphs"), model) is None


def test_an_arm_is_loaded_by_unsloth_alone(monkeypatch):
    calls = {}

    def from_pretrained(name, **given):
        calls["load"] = (name, given)
        return model, None

    def get_peft_model(model, **given):
        calls["lora"] = given
        return model

    model = make_lora(hidden_size=32, intermediate_size=64)
    fast = argparse.Namespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", argparse.Namespace(FastLanguageModel=fast))
    args = argparse.Namespace(model="m", dtype="4bit", rank=8)
    expected = {
        "stock": {"use_gradient_checkpointing": "unsloth"},
        "skip-auto": {"use_gradient_checkpointing": "unsloth", "checkpoint_skip_layers": "auto"},
        "padded+no-checkpointing": {"use_gradient_checkpointing": False},
    }
    for name, lora in expected.items():
        loaded = models.load_arm(args, arm_of(name), 4096)
        assert calls["lora"] == {"r": 8, "lora_alpha": 8} | lora
        assert calls["load"] == ("m", {
            "max_seq_length": 4096, "dtype": torch.bfloat16, "load_in_4bit": True,
            "use_gradient_checkpointing": lora["use_gradient_checkpointing"],
        })  # fmt: skip
        assert all(bool(p.any()) for name, p in loaded.named_parameters() if "lora_" in name)
    assert "_sparse_backend" not in model.__dict__


class DemoDecoderLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = True

    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.fixture
def installed(monkeypatch):
    """What the arms read and call of the Unsloth that is installed, its own code, without the rest of it.

    Importing all of Unsloth takes half a minute.
    """
    found = importlib.util.find_spec("unsloth")
    if found is None or why_not_installed(arm_of("block-graphs+skip-max")):
        pytest.skip("this Unsloth does not have these arms, or is not installed")
    folder = Path(found.origin).parent / "models"
    spec = importlib.util.spec_from_file_location("unsloth.models._block_compile", folder / "_block_compile.py")
    blocks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(blocks)
    names = {"_skip_aware_flag", "_gc_keep_layers_env", "_AutoCheckpointSkip", "skip_checkpointing"}
    names |= {"_size_auto_checkpoint_skip_for_trainer", "_PAIRED_FORWARD_TRAINERS"}
    tree = ast.parse((folder / "_utils.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if names & {getattr(node, "name", ""), *map(target_of, targets_of(node))}]
    utils = types.ModuleType("unsloth.models._utils")
    vars(utils).update(os=os, torch=torch, find_decoder_layers=lambda model: list(model.layers))
    exec(compile(tree, str(folder / "_utils.py"), "exec"), vars(utils))
    assert names <= vars(utils).keys()
    offload = types.SimpleNamespace(CURRENT_GC_INDEX=0, FIRST_PASS=False, LAST_GC_INDEX=32)
    for name, module in {
        "unsloth": types.SimpleNamespace(models=types.SimpleNamespace(_utils=utils, _block_compile=blocks)),
        "unsloth.models": types.SimpleNamespace(_utils=utils, _block_compile=blocks),
        "unsloth.models._block_compile": blocks,
        "unsloth.models._utils": utils,
        "unsloth_zoo": types.SimpleNamespace(gradient_checkpointing=offload),
        "unsloth_zoo.gradient_checkpointing": offload,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("UNSLOTH_GC_KEEP_LAYERS", raising=False)
    return types.SimpleNamespace(blocks=blocks, utils=utils, offload=offload, folder=folder)


def targets_of(node):
    return node.targets if isinstance(node, ast.Assign) else []


def target_of(node):
    return getattr(node, "id", "")


def test_what_compiled_layers_did_is_read_off_the_unsloth_that_is_installed(installed, monkeypatch):
    monkeypatch.setattr(DemoDecoderLayer, "forward", DemoDecoderLayer.forward)  # and back afterwards
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(DemoDecoderLayer() for _ in range(3))
    assert why_unavailable(arm_of("block-graphs"), model) is not None
    assert arm_notes(arm_of("padded"), model) == "no layer compiled"
    blocks = installed.blocks
    blocks._wrap(DemoDecoderLayer, dict(blocks._COMPILE_OPTIONS) | {"triton.cudagraphs": True})
    assert why_unavailable(arm_of("block-graphs"), model) is None
    for layer, mode in zip(model.layers, (blocks._FULL, blocks._SPLIT, blocks._OFF), strict=True):
        layer.__dict__.update(_unsloth_block_checked=3, _unsloth_block_mode=mode)
    assert arm_notes(arm_of("block-graphs"), model) == "2 of 3 layers compiled, CUDA graphs of 0 shapes"
    inner = inspect.getclosurevars(inspect.getclosurevars(DemoDecoderLayer.forward).nonlocals["run"]).nonlocals
    inner["graph_shapes"].update({(1, length, 4) for length in range(9)})
    inner["graphs_off"][0] = True
    assert arm_notes(arm_of("block-graphs"), model) == "2 of 3 layers compiled, CUDA graphs given up at 9 shapes"
    assert arm_notes(arm_of("padded"), model) == "2 of 3 layers compiled"
    assert arm_notes(arm_of("stock"), model) == ""
    monkeypatch.setattr(DemoDecoderLayer, "forward", lambda self, hidden_states: None)
    DemoDecoderLayer.forward._unsloth_block_compiled = True
    assert arm_notes(arm_of("block-graphs"), model).endswith(
        ", CUDA graphs not counted: this Unsloth keeps them elsewhere"
    )


def test_layers_are_kept_and_planned_anew_by_the_unsloth_that_is_installed(installed, monkeypatch):
    class Layer(DemoDecoderLayer):
        """Unsloth makes the flag a property of the class."""

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Layer() for _ in range(3))
    installed.utils.skip_checkpointing(model, "max")
    assert [layer.gradient_checkpointing for layer in model.layers] == [False] * 3
    assert arm_notes(arm_of("skip-max"), model) == "3 layers not checkpointed"
    replan_arm(arm_of("skip-max"), model, 4, 2048)
    assert [layer.gradient_checkpointing for layer in model.layers] == [False] * 3
    # On a GPU the next two steps choose; until then every layer is checkpointed again.
    planner = installed.utils._AutoCheckpointSkip(model, list(model.layers), model.layers[-1])
    install = classmethod(lambda cls, model: setattr(model, "_unsloth_auto_skip", planner))
    monkeypatch.setattr(installed.utils._AutoCheckpointSkip, "install", install)
    replan_arm(arm_of("skip-auto"), model, 4, 2048)
    assert [layer.gradient_checkpointing for layer in model.layers] == [True] * 3
    assert (planner.target_batch, planner.target_seq) == (4, 2048)
    assert (installed.offload.FIRST_PASS, installed.offload.LAST_GC_INDEX) == (True, 0)
    assert arm_notes(arm_of("skip-auto"), model) == "0 layers not checkpointed"
