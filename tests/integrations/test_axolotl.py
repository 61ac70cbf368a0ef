"""The axolotl plugin: in axolotl's order of calls on a stand-in of its interface, and against axolotl's own classes."""

import importlib
import importlib.util
import inspect
import sys

import pytest
from pydantic import BaseModel, ConfigDict, model_validator

from sparse_unsloth import get_state
from sparse_unsloth.errors import AttachError, ConfigError

from tiny_models import make_base, make_lora

MODULE = "sparse_unsloth.integrations.axolotl"
CLASS = f"{MODULE}.SparseUnslothPlugin"
INSTALLED = importlib.util.find_spec("axolotl") is not None
BLOCK = {"backward_rows": 0.5, "estimator": {"rank": 4}}


class Config(dict):
    """As axolotl's ``DictDefault``: None for what is not there, here and in the blocks."""

    def __missing__(self, key):
        return None

    def __setitem__(self, key, value):
        super().__setitem__(key, Config(value) if type(value) is dict else value)


class InputConfig(BaseModel):
    """Stands for ``AxolotlInputConfig``, whose own check turns its kernels on where nothing is said of them."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _turns_kernels_on(cls, data):
        return data if data.get("lora_mlp_kernel") is not None else {**data, "lora_mlp_kernel": True}


@pytest.fixture
def module(stand_in, monkeypatch):
    """The plugin's module, imported with the real base class where axolotl is installed."""
    if not INSTALLED:
        names = ("register", "get_input_args", "pre_model_load", "post_lora_load", "post_model_load", "post_train")
        base = type("BasePlugin", (), {name: lambda self, *given: None for name in names})
        stand_in("axolotl.integrations.base", BasePlugin=base)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def validate(module, plugin, given):
    """What axolotl makes of a configuration before it loads a model."""
    cfg = Config(given)
    plugin.register(cfg)
    path, _, name = plugin.get_input_args().rpartition(".")
    assert path == module.__name__
    merged = type("AxolotlInputConfig", (InputConfig, getattr(module, name)), {})
    checked, made = merged(**cfg).model_dump(exclude_none=True), Config()
    for key, value in checked.items():
        made[key] = value
    return made


def test_a_configuration_trains_sparsely(module, build_trainer):
    plugin = module.SparseUnslothPlugin()
    cfg = validate(module, plugin, {"adapter": "lora", "sparse_unsloth": BLOCK})
    assert [cfg[name] for name in module.KERNELS] == [False] * 4
    model = make_lora()
    plugin.post_model_load(cfg, model)
    state = get_state(model)
    assert (state.config.backward_rows, state.config.estimator.rank) == (0.5, 4)
    trainer = build_trainer(model)
    trainer.train()
    assert [log["sparsity/enabled"] for log in trainer.state.log_history if "loss" in log] == [1.0, 1.0]


@pytest.mark.parametrize(("given", "preset"), [({}, "auto"), ({"sparse_unsloth": "rows"}, "rows")])
def test_presets(module, given, preset):
    plugin, model = module.SparseUnslothPlugin(), make_lora()
    plugin.post_model_load(validate(module, plugin, given), model)
    state = get_state(model)
    assert (state.config if state.auto is None else state.auto.asked).preset == preset


def test_what_is_given_by_hand_stays_so_under_auto(module):
    """`auto` decides what was not given, so a default that axolotl wrote into the block would be taken for a wish."""
    plugin, model = module.SparseUnslothPlugin(), make_lora()
    plugin.post_model_load(validate(module, plugin, {"sparse_unsloth": {"preset": "auto", "seed": 1}}), model)
    assert get_state(model).auto.asked.model_fields_set == {"preset", "seed"}


def test_mistakes_say_what_to_do(module):
    plugin = module.SparseUnslothPlugin()
    with pytest.raises(ValueError, match=r"sparse_unsloth\n.*backward_row: .*did you mean backward_rows"):
        validate(module, plugin, {"sparse_unsloth": {"backward_row": 0.5}})
    with pytest.raises(ConfigError, match="lora_mlp_kernel: axolotl's functions would replace those of sparse_unsloth"):
        plugin.register(Config(lora_mlp_kernel=True))
    with pytest.raises(AttachError, match=r"trains without adapters\. Set adapter: lora or qlora"):
        plugin.post_model_load(Config(sparse_unsloth="rows"), make_base())


def test_a_model_for_inference_stays_as_it_is(module):
    model = make_lora().requires_grad_(False)
    module.SparseUnslothPlugin().post_model_load(Config(sparse_unsloth="rows"), model)
    assert get_state(model) is None


@pytest.mark.skipif(not INSTALLED, reason="axolotl is not installed (docs/front-ends.md)")
def test_axolotl_takes_the_plugin(module):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    for name in ("register", "get_input_args", "post_model_load"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (module.SparseUnslothPlugin, BasePlugin))
        assert list(ours.parameters) == list(theirs.parameters)
    manager, model = PluginManager.get_instance(), make_lora()
    given = {"adapter": "lora", "plugins": [CLASS], "sparse_unsloth": {"preset": "auto", "seed": 5}}
    given |= {"base_model": "a/b", "datasets": [{"path": "a", "type": "alpaca"}], "num_epochs": 1, "sequence_len": 64}
    cfg = DictDefault({**given, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4})
    gpu = {"n_gpu": 1, "bf16": True, "fp8": False, "n_node": 1, "compute_capability": "sm_90", "tf32": True}
    try:
        prepare_plugins(cfg)
        valid = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.11.0"})
        assert [valid[name] for name in module.KERNELS] == [False] * 4, "axolotl turns them on where it has a GPU"
        manager.post_model_load(valid, model)
        assert get_state(model).auto.asked.model_fields_set == {"preset", "seed"}
        with pytest.raises(ValueError, match=r"sparse_unsloth\n.*backward_row: unknown key"):
            validate_config(DictDefault({**cfg, "sparse_unsloth": {"backward_row": 0.5}}))
    finally:
        manager.plugins.clear()
