"""Attached models compared with plain PEFT, and with a masked model built from hooks alone."""

import copy
from functools import partial

import pytest
import torch
from transformers.integrations import flex_attention

from sparse_unsloth import attach, attachment, detach, get_state
from sparse_unsloth.errors import AttachError, ConfigError, SparsityError
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.tokens.partition import TokenPartition

from masked_models import assert_gradients_close, masked_by_hooks, record_selections
from tiny_models import FAMILIES, always, loras, loss_and_gradients, make_base, make_batch, make_lora
from unsloth_stand_in import decoder_layers

NOTHING_DROPPED = 1e-9
"""A sparsity so small that every channel is kept: all hooks work, and nothing is left out."""


@pytest.mark.parametrize(
    ("family", "side"), [*((family, "right") for family in FAMILIES), ("llama", "left"), ("gemma2", "left")]
)
def test_nothing_dropped_equals_plain_peft(family, side):
    plain, sparse = make_lora(family), make_lora(family)
    attach(sparse, always(mlp={"all": NOTHING_DROPPED}, self_attn={"all": NOTHING_DROPPED}))
    optimisers = [torch.optim.AdamW(loras(model).values(), lr=1e-3) for model in (plain, sparse)]
    for step in range(4):
        batch = make_batch(step, side)
        plain_loss, plain_gradients = loss_and_gradients(plain, batch)
        sparse_loss, sparse_gradients = loss_and_gradients(sparse, batch)
        torch.testing.assert_close(sparse_loss, plain_loss, rtol=1e-5, atol=1e-5)
        if step == 0:
            assert_gradients_close(sparse_gradients, plain_gradients, rtol=1e-4, atol=1e-6)
        for optimiser in optimisers:
            optimiser.step()
    for name, parameter in loras(plain).items():
        torch.testing.assert_close(loras(sparse)[name], parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "side", "criterion"),
    [
        *((family, "right", "estimator") for family in FAMILIES),
        *(("llama", side, criterion) for side, criterion in (("left", "estimator"), ("right", "random"))),
        ("qwen3", "left", "random"),
    ],
)
def test_sparse_model_equals_masked_model(family, side, criterion, monkeypatch):
    sparse, masked = make_lora(family), make_lora(family)
    attach(sparse, always(criterion=criterion))
    contexts = record_selections(sparse, monkeypatch)
    batch = make_batch(3, side)
    loss, gradients = loss_and_gradients(sparse, batch)
    masked_by_hooks(masked, contexts[0].selections, contexts[0].partition)
    masked_loss, masked_gradients = loss_and_gradients(masked, batch)
    torch.testing.assert_close(loss, masked_loss)
    assert_gradients_close(gradients, masked_gradients, rtol=1e-4, atol=1e-6)
    plain_loss, _ = loss_and_gradients(make_lora(family), batch)
    assert abs(plain_loss - loss) > 1e-5, "the sparse forward left nothing out"


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_uses_its_own_forward(reentrant):
    """Two forwards before both backward passes: gradients equal those without checkpointing."""
    batches = [make_batch(1), make_batch(2, lengths=((4, 3), (6, 1)))]
    expected = None
    for checkpointing in (False, True):
        model = make_lora()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        attach(model, always(criterion="random"))
        losses = [model(**batch).loss for batch in batches]
        (losses[0] + 2 * losses[1]).backward()
        gradients = {name: parameter.grad for name, parameter in loras(model).items()}
        if expected is None:
            expected = gradients
    assert_gradients_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_gradient_accumulation_adds_up():
    model = make_lora()
    attach(model, always())
    batches = [make_batch(1), make_batch(2)]
    single = [loss_and_gradients(model, batch)[1] for batch in batches]
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    for name, parameter in loras(model).items():
        torch.testing.assert_close(parameter.grad, single[0][name] + single[1][name])


@pytest.mark.parametrize(("family", "kind"), [*((family, "nf4") for family in FAMILIES), ("llama", "fp4")])
def test_four_bit_model_equals_plain_peft(family, kind, tmp_path):
    def load():
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32)
        return make_lora(base=base)

    make_base(family).save_pretrained(tmp_path)
    plain, sparse = load(), load()
    attach(sparse, always(mlp={"all": NOTHING_DROPPED}, self_attn={"all": NOTHING_DROPPED}))
    batch = make_batch()
    plain_loss, plain_gradients = loss_and_gradients(plain, batch)
    sparse_loss, sparse_gradients = loss_and_gradients(sparse, batch)
    torch.testing.assert_close(sparse_loss, plain_loss, rtol=1e-4, atol=1e-4)
    assert_gradients_close(sparse_gradients, plain_gradients, rtol=1e-3, atol=1e-4)
    sparse.eval()
    with torch.no_grad():
        sparse(**batch)  # bitsandbytes repacks here on CPUs with AVX512-BF16, unless attach turned that off
    sparse.train()
    again, _ = loss_and_gradients(sparse, batch)
    torch.testing.assert_close(again, sparse_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_equals_plain_peft_to_its_precision(family):
    batch = make_batch()
    _, exact_gradients = loss_and_gradients(make_lora(family).double(), batch)
    plain = make_lora(family)
    plain.get_base_model().to(torch.bfloat16)
    sparse = copy.deepcopy(plain)
    attach(sparse, always(mlp={"all": NOTHING_DROPPED}, self_attn={"all": NOTHING_DROPPED}))
    _, plain_gradients = loss_and_gradients(plain, batch)
    _, gradients = loss_and_gradients(sparse, batch)
    for name, truth in exact_gradients.items():
        error = (gradients[name].double() - truth).norm()
        assert error <= 2 * (plain_gradients[name].double() - truth).norm() + 0.02 * truth.norm(), name


def test_evaluation_generation_and_no_labels_are_dense(caplog):
    plain, model = make_lora(), make_lora()
    attach(model, always())
    batch = make_batch()
    for context in (plain, model):
        context.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        prompt = batch["input_ids"][:1, :5]
        generated = [m.generate(input_ids=prompt, max_new_tokens=4, do_sample=False) for m in (plain, model)]
    assert torch.equal(*generated)
    plain.train(), model.train()
    without = {name: value for name, value in batch.items() if name != "labels"}
    for _ in range(2):
        torch.testing.assert_close(model(**without).logits, plain(**without).logits)
    assert caplog.text.count("came without labels") == 1


def test_detach_restores_the_model_exactly():
    plain, model = make_lora(), make_lora()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    forwards = {name: module.forward for name, module in model.named_modules()}
    attach(model, always())
    loss_and_gradients(model, make_batch())
    detach(model)
    assert get_state(model) is None
    for name, module in model.named_modules():
        assert set(module.__dict__) == before[name], name
        assert module.forward == forwards[name], name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
    plain_loss, _ = loss_and_gradients(plain, make_batch())
    loss, _ = loss_and_gradients(model, make_batch())
    assert torch.equal(loss, plain_loss)
    attach(model, always())  # and again
    with pytest.raises(AttachError, match="attached already"):
        attach(model, always())


def test_report_names_every_layer():
    model = make_lora()
    report = attach(model, always(mlp={"1-2": 0.5}, self_attn={"2": 0.5}))
    assert [(bool(layer.mlp), bool(layer.self_attn)) for layer in report.layers] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    text = str(report)
    assert "2 of 3 layers sparse" in text
    assert "layer 1: MLP 64 of 128 channels; attention dense" in text


def test_two_models_at_once_and_deep_copies_are_independent():
    first, second = make_lora(seed=0), make_lora(seed=5)
    attach(first, always())
    attach(second, always(mlp={"0": 0.9}, self_attn={}))
    batch = make_batch()
    alone, _ = loss_and_gradients(first, batch)
    loss_and_gradients(second, batch)
    twin = copy.deepcopy(first)
    assert get_state(twin) is not get_state(first)
    assert get_state(twin).model is twin
    torch.testing.assert_close(loss_and_gradients(twin, batch)[0], alone)
    detach(twin)
    torch.testing.assert_close(loss_and_gradients(first, batch)[0], alone)


def test_state_never_enters_a_checkpoint(tmp_path):
    plain, model = make_lora(), make_lora()
    attach(model, always())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "sparsity_config.yaml"} <= files
    from peft import PeftModel

    from sparse_unsloth import SparsityConfig

    reloaded = PeftModel.from_pretrained(make_base(), tmp_path)
    batch = make_batch()
    model.eval(), reloaded.eval()
    torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits)
    assert SparsityConfig.from_file(tmp_path / "sparsity_config.yaml") == get_state(model).config
    merged = model.merge_and_unload()
    merged.eval()
    torch.testing.assert_close(merged(**batch).logits, reloaded(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["disabled", "merged", "two adapters", "fake quantisation"])
def test_adapters_that_the_functions_do_not_know_are_left_to_peft(how):
    plain, model = make_lora(), make_lora()
    attach(model, always())
    batch = make_batch()
    if how == "disabled":
        with plain.disable_adapter(), model.disable_adapter():
            torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
        return
    for each in (plain, model):
        if how == "merged":
            each.merge_adapter()
        elif how == "fake quantisation":  # prepared after attaching, as torchao does it
            for module in list(each.modules()):
                if hasattr(module, "lora_A"):
                    module.base_layer.weight_fake_quantizer = torch.nn.Identity()
        else:
            torch.manual_seed(9)
            each.add_adapter("second", each.peft_config["default"])
            each.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)


def test_lora_on_some_projections_only(monkeypatch):
    targets = ["q_proj", "v_proj", "gate_proj"]
    sparse, masked = make_lora(targets=targets), make_lora(targets=targets)
    attach(sparse, always())
    contexts = record_selections(sparse, monkeypatch)
    batch = make_batch(3)
    loss, gradients = loss_and_gradients(sparse, batch)
    for module in list(masked.modules()):  # the hooks look for base_layer
        for name in ("k_proj", "o_proj", "up_proj", "down_proj"):
            if hasattr(module, name) and not hasattr(getattr(module, name), "base_layer"):
                getattr(module, name).__dict__["base_layer"] = getattr(module, name)
    masked_by_hooks(masked, contexts[0].selections, contexts[0].partition)
    masked_loss, masked_gradients = loss_and_gradients(masked, batch)
    torch.testing.assert_close(loss, masked_loss)
    assert_gradients_close(gradients, masked_gradients, rtol=1e-4, atol=1e-6)


def test_padding_free_batch_equals_padded_batch(monkeypatch):
    model = make_lora()
    attach(model, always(criterion="magnitude"))
    padded = make_batch()
    keep = padded["attention_mask"].bool()
    packed = {
        "input_ids": padded["input_ids"][keep][None],
        "labels": padded["labels"][keep][None],
        "position_ids": torch.cat([torch.arange(int(n)) for n in keep.sum(1)])[None],
        "use_cache": False,  # with a cache transformers does not look for packed documents
    }
    contexts = record_selections(model, monkeypatch)
    loss, gradients = loss_and_gradients(model, padded)
    packed_loss, packed_gradients = loss_and_gradients(model, packed)
    torch.testing.assert_close(packed_loss, loss)
    assert_gradients_close(packed_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert len(contexts[0].partition.context) == len(contexts[1].partition.context)


def bad_models():
    from peft import LoraConfig, get_peft_model

    def lora(**options):
        return get_peft_model(make_base(), LoraConfig(r=4, target_modules=["gate_proj", "q_proj"], **options)).train()

    def trainable():
        model = make_base()
        return model.train()

    def int8():
        model = make_lora()
        weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
        weight.weight = torch.nn.Parameter(weight.weight.to(torch.float8_e4m3fn), requires_grad=False)
        return model

    def scaled():
        model = make_lora()
        mlp = model.get_base_model().model.layers[1].mlp
        mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
        return model

    def activation():
        model = make_lora()
        model.get_base_model().model.layers[1].mlp.act_fn = torch.nn.Tanh()
        return model

    def fake_quantised(side):
        model = make_lora()
        projection = model.get_base_model().model.layers[1].mlp.up_proj
        part = projection.base_layer if side == "weight" else projection.lora_A["default"]
        part.add_module(f"{side}_fake_quantizer", torch.nn.Identity())
        return model

    def unreached():
        model = make_lora()
        layer = model.get_base_model().model.layers[1]
        layer.mlp.__class__ = type("Idle", (type(layer.mlp),), {"__call__": lambda self, x: x})
        return model

    return {
        "dora": (
            lambda: lora(use_dora=True),
            "uses DoRA, which channel .*, and row sparsity takes .* Set use_dora=False",
        ),
        "dropout": (lambda: lora(lora_dropout=0.1), "lora_dropout=0.1.*Set lora_dropout=0"),
        "lora bias": (lambda: lora(lora_bias=True), "Set lora_bias=False"),
        "full fine-tuning": (trainable, "is trainable, and the sparse functions compute no gradient"),
        "float8": (int8, "layer type Linear .* is not supported.*load_in_4bit"),
        "fake-quantised weight": (lambda: fake_quantised("weight"), "fake-quantised.*Train without qat_scheme"),
        "fake-quantised input": (lambda: fake_quantised("activation"), "fake-quantised.*Train without qat_scheme"),
        "extra scale": (scaled, "computes something else than the projections"),
        "activation": (activation, "activation Tanh.* has no sparse path"),
        "not a decoder": (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "has no decoder layer"),
    }


@pytest.mark.parametrize("case", bad_models())
def test_unsupported_models_are_refused_and_left_as_they_were(case):
    build, message = bad_models()[case]
    model = build()
    with pytest.raises(AttachError, match=message):
        attach(model, always())
    assert get_state(model) is None
    assert not any("_sparse_runtime" in module.__dict__ for module in model.modules())


def test_layers_that_the_model_does_not_have():
    with pytest.raises(ConfigError, match="7"):
        attach(make_lora(), always(mlp={"7": 0.5}))


def test_a_schedule_that_nothing_drives_is_an_error():
    model = make_lora()
    attach(model, always(start_step=0.05))
    with pytest.raises(SparsityError, match="nothing drives it"):
        model(**make_batch())
    state = get_state(model)
    state.begin_training(driver=object(), max_steps=100)
    state.set_step(4)
    model(**make_batch())
    assert metrics(state)["sparsity/enabled"] == 0
    state.set_step(5)
    model(**make_batch()).loss.backward()
    state.verify_step()
    assert metrics(state)["sparsity/context_share"] == pytest.approx(18 / 33)


def test_forwards_replaced_after_attaching_are_noticed():
    model = make_lora()
    attach(model, always())
    mlp = model.get_base_model().model.layers[0].mlp
    del mlp.__dict__["forward"]
    state = get_state(model)
    with pytest.raises(AttachError, match="were replaced after attach"):
        state.begin_training(driver=object(), max_steps=10)
    state.hooked.clear()
    state.begin_training(driver=object(), max_steps=10)
    state.set_step(0)
    model(**make_batch()).loss.backward()
    with pytest.raises(AttachError, match=r"did not run sparsely in a training step.*layers\.0\.mlp"):
        state.verify_step()


def test_estimators_that_wait_for_samples_say_so():
    model = make_lora()
    attach(model, always(estimator={"kind": "prior"}))
    with pytest.raises(SparsityError, match="still waits for calibration samples"):
        model(**make_batch())
    detach(model)
    attach(model, always(estimator={"kind": "prior"}), calibration_samples=[make_batch(1), make_batch(2)])
    loss_and_gradients(model, make_batch())


def test_last_prompt_token_is_dense_and_a_long_prompt_spares_the_others():
    partition = TokenPartition.from_labels(**{k: make_batch()[k] for k in ("labels", "attention_mask")})
    width = partition.shape[1]
    assert {8, width + 4, 2 * width + 6} <= set(partition.dense.tolist())
    assert {7, width + 3, 2 * width + 5} <= set(partition.context.tolist())


def test_forwards_do_not_pile_up():
    """Regression: the older implementation wrapped module.forward again at every step."""
    model = make_lora()
    attach(model, always())
    mlp = model.get_base_model().model.layers[0].mlp
    forward, hooks = mlp.forward, len(model._forward_pre_hooks)
    for step in range(3):
        loss_and_gradients(model, make_batch(step))
    assert mlp.forward == forward
    assert len(model._forward_pre_hooks) == hooks
    assert all(runtime.context is None for runtime in get_state(model).runtimes.values())


def test_attaching_compiles_nothing_and_leaves_the_compiler_as_it_was(monkeypatch):
    """Unsloth compiles class forwards, and its forward without labels changes how torch.compile runs from then on."""
    model, compiled = make_lora("llama"), []
    mlp, base = decoder_layers(model)[0].mlp, model.get_base_model()
    run = torch.compile(type(mlp).forward, backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    monkeypatch.setattr(type(mlp), "forward", run)
    base.register_forward_hook(lambda *_: torch.compiler.set_stance("eager_on_recompile") and None)
    attach(model, {"backward_rows": 0.25})
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert compiled == []
    with torch.compiler.set_stance("default"):
        model(**make_batch())
    assert compiled


def test_flex_attention_is_probed_with_a_kernel_that_has_a_backward(monkeypatch):
    # Traced as always, run by PyTorch: the kernels of a CPU take 20 s to compile and read no such option.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "_instance", None)
    model, seen = make_lora("llama"), []
    model.config._attn_implementation = "flex_attention"
    decoder_layers(model)[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("kernel_options")), with_kwargs=True
    )
    attach(model, {"backward_rows": 0.25})
    assert seen == [{"FORCE_USE_FLEX_ATTENTION": True}]
    detach(model)
    monkeypatch.setattr(attachment.whole_layer, "why_not_captured", lambda runtime: "")
    with pytest.raises(
        AttachError, match=r"can be captured: its attention is flex_attention.*attn_implementation='sdpa'"
    ):
        attach(model, {"backward_rows": 0.25, "cuda_graphs": True})


@pytest.mark.parametrize("config", [{"preset": "dense"}, {"backward_rows": 0.25}])
def test_graphs_without_kernels_are_refused_with_the_reason(config):
    model = make_lora("llama")
    with pytest.raises(AttachError, match=r"no layer of this model can be captured: Triton's kernels do not run here"):
        attach(model, {**config, "cuda_graphs": True})
    assert get_state(model) is None
