"""The LLaMA-Factory hook: on a stand-in of its training function, and against its own functions."""

import importlib.util
import inspect
import json
import sys

import pytest

from sparse_unsloth import get_state
from sparse_unsloth.errors import AttachError, ConfigError
from sparse_unsloth.integrations import llamafactory

from tiny_models import make_base, make_lora

INSTALLED = importlib.util.find_spec("llamafactory") is not None


@pytest.fixture
def run(stand_in, build_trainer):
    """``run(model)`` puts a training function of LLaMA-Factory's signature in place, and notes what it got."""

    def put(model):
        def run_exp(args=None, callbacks=None):
            put.arguments = args
            put.trainer = build_trainer(model, callbacks)
            put.trainer.train()

        stand_in("llamafactory.train.tuner", run_exp=run_exp)

    return put


def test_a_configuration_trains_sparsely(run):
    model = make_lora()
    run(model)
    llamafactory.train({"stage": "sft", "sparse_unsloth": {"backward_rows": 0.5}})
    assert run.arguments == {"stage": "sft"}
    assert get_state(model).config.backward_rows == 0.5
    assert [log["sparsity/enabled"] for log in run.trainer.state.log_history if "loss" in log] == [1.0, 1.0]


def test_auto_is_the_default(run, capsys):
    model = make_lora()
    run(model)
    llamafactory.train({"stage": "sft"})
    assert get_state(model).auto.asked.preset == "auto"
    assert "auto" in capsys.readouterr().out


def test_mistakes_say_what_to_do(run):
    run(make_base())
    with pytest.raises(ConfigError, match="did you mean backward_rows"):
        llamafactory.train({"sparse_unsloth": {"backward_row": 0.5}})
    with pytest.raises(AttachError, match=r"trains without adapters\. Set finetuning_type: lora"):
        llamafactory.train({})


def test_the_command_line_is_llama_factorys(run, stand_in, monkeypatch):
    run(make_lora())
    stand_in("llamafactory.hparams", read_args=lambda: {"stage": "sft", "sparse_unsloth": "rows"})
    llamafactory.main()
    assert run.arguments == {"stage": "sft"}
    stand_in("llamafactory.hparams", read_args=lambda: ["--stage", "sft"])
    with pytest.raises(ConfigError, match="as a file"):
        llamafactory.main()


@pytest.mark.skipif(not INSTALLED, reason="LLaMA-Factory is not installed (docs/front-ends.md)")
def test_llama_factory_has_what_is_used(tmp_path, monkeypatch):
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    assert list(inspect.signature(run_exp).parameters) == ["args", "callbacks"]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"stage": "sft"}))
    monkeypatch.setattr(sys, "argv", ["module", str(file)])
    assert read_args()["stage"] == "sft"
