"""Adapters other than plain LoRA are computed exactly, left dense, or refused by name."""

import peft
import pytest
import torch

from sparse_unsloth import attach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError

from exact_models import ALL_ROWS, CONFIGS, TARGETS, assert_exact, lora_config, with_adapter
from tiny_models import make_base, make_batch, make_lora

TUNERS = {
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
    "SHIRA": lambda: peft.ShiraConfig(r=4, target_modules=["gate_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=TARGETS),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["down_proj"]),
    "VBLORA": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, target_modules=["v_proj"]),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=["up_proj"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_other_tuners_are_refused_by_name(tuner, kind):
    model = with_adapter(TUNERS[tuner]())
    with pytest.raises(AttachError, match=rf"is {tuner} \(\w+Config\), which has no sparse path.*LoraConfig"):
        attach(model, CONFIGS[kind])
    assert get_state(model) is None


def test_a_tuner_beside_lora_is_refused():
    model = peft.get_peft_model(make_base(), peft.LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["gate_proj"]))
    with pytest.raises(AttachError, match="'other' is LOHA"):
        attach(model, ALL_ROWS)


def test_a_layer_of_another_tuner_is_refused_without_its_configuration():
    model = peft.inject_adapter_in_model(TUNERS["OFT"](), make_base()).train()
    model.__dict__.pop("peft_config")
    with pytest.raises(AttachError, match=r"layers\.0\.self_attn\.q_proj: an adapter of the kind oft"):
        attach(model, ALL_ROWS)


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        ({"alora_invocation_tokens": [7, 9]}, r"\(alora_invocation_tokens\)", "rows"),
        ({"alora_invocation_tokens": [7, 9]}, r"\(alora_invocation_tokens\)", "channels"),
        ({"alora_invocation_tokens": [7, 9], "target_modules": ["q_proj"]}, "alora_invocation_tokens", "rows"),
        ({"velora_config": peft.VeloraConfig()}, "VeloraLinearVariant", "rows"),
        ({"monteclora_config": peft.MontecloraConfig()}, "MontecloraLinearVariant", "rows"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters", "rows"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}, "target_param", "channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_of_lora_are_refused_by_name(options, name, kind):
    with pytest.raises(AttachError, match=name):
        attach(with_adapter(lora_config(**options)), CONFIGS[kind])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "mica"},
        {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], nblocks=2, match_strict=False)},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["input_layernorm"]},
        {"trainable_token_indices": [4, 5]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_rows_of_lora_in_its_forms_are_exact(options):
    model = with_adapter(lora_config(**options)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(4))
    assert_exact(model, make_batch())


def test_an_adapter_of_another_kind_that_takes_over_runs_dense(caplog):
    model, batch = make_lora(), make_batch()
    attach(model, ALL_ROWS)
    state = get_state(model)
    model.add_adapter("later", lora_config(alora_invocation_tokens=[7]))
    model(**batch)
    assert (state.counts.sparse_forwards, caplog.text) == (1, "")
    model.set_adapter("later")
    model(**batch)
    assert state.counts.sparse_forwards == 1
    assert "'later' uses the LoRA variant ALoraLinearVariant (alora_invocation_tokens)" in caplog.text
    assert "the model runs as it does without sparse paths" in caplog.text
    model.set_adapter("default")
    model(**batch)
    assert state.counts.sparse_forwards == 2
