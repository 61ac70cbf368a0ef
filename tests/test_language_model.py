"""`FastSparseLanguageModel` on the PEFT backend: loading, LoRA, training through TRL, saving, loading again."""

import copy
import sys

import pytest
import torch
import transformers

from sparse_unsloth import FastSparseLanguageModel, SparsityConfig, attach, detach, get_state
from sparse_unsloth.backends.choose import explain_backend
from sparse_unsloth.errors import AttachError, BackendError, InstallError

from decoder_models import FAMILIES, causal
from tiny_models import always, load, make_batch, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


def samples(count=24):
    """Prompt-completion rows: the answer repeats the prompt's first word."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        words = [f"w{int(i)}" for i in torch.randint(3, 96, (12,), generator=generator)]
        rows.append({"prompt": " ".join(words) + " ", "completion": f"{words[0]} {words[1]}"})
    return rows


def make_trainer(model, tokenizer, folder, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 64,
        **changes,
    }
    data = Dataset.from_list(samples())
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=SFTConfig(**arguments))


def test_auto_says_which_backend_and_why(checkpoint, capsys):
    load(checkpoint, backend="auto")
    if not torch.cuda.is_available():
        assert explain_backend() == ("peft", "no CUDA GPU")
        assert "backend peft (no CUDA GPU)" in capsys.readouterr().out
        with pytest.raises(BackendError, match=r"'unsloth' cannot run: no CUDA GPU\. Use backend='peft'"):
            load(checkpoint, backend="unsloth")
    with pytest.raises(BackendError, match="must be 'auto', 'unsloth' or 'peft'"):
        load(checkpoint, backend="trl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_finetuning": True}, "PEFT backend has no full_finetuning. Use backend='unsloth'"),
        ({"load_in_8bit": True, "fast_inference": True}, "no load_in_8bit, fast_inference"),
        ({"max_seq_length": 4096}, r"max_seq_length=4096 is beyond the 128 positions.*rope_scaling={.rope_type"),
        ({"sparsity": "o1"}, "for adapter folders; give it to get_peft_model"),
    ],
)
def test_what_the_peft_backend_cannot_do_is_refused(checkpoint, options, message):
    with pytest.raises(BackendError, match=message):
        load(checkpoint, **options)


def test_unsloths_arguments_are_accepted(checkpoint):
    model, tokenizer = load(checkpoint, fix_tokenizer=True, max_lora_rank=64, gpu_memory_utilization=0.5, token=None)
    model = FastSparseLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "k_proj", "o_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=True,
        loftq_config=None,
        finetune_last_n_layers=2,
        sparsity={"mlp": {"1-2": 0.5}, "estimator": {"kind": "svd"}},
    )
    assert tokenizer.padding_side == "right"
    trained = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1", "2"}
    assert model.is_gradient_checkpointing
    with pytest.raises(BackendError, match="has adapters already"):
        FastSparseLanguageModel.get_peft_model(model)


def test_training_switches_logs_and_ends_dense(checkpoint, tmp_path):
    model, tokenizer = load(checkpoint)
    sparsity = {"mlp": {"all": 0.5}, "estimator": {"calibration_samples": 8}, "start_step": 2, "end_step": 8}
    model = FastSparseLanguageModel.get_peft_model(model, r=4, sparsity=sparsity, use_gradient_checkpointing=False)
    trainer = make_trainer(model, tokenizer, tmp_path)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sparsity/enabled" in log]
    assert [log["sparsity/enabled"] for log in logs] == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert all(log["sparsity/context_share"] > 0.5 for log in logs)
    assert logs[3]["sparsity/mean_mlp"] == pytest.approx(0.5)
    state = get_state(model)
    assert state.estimator.kind == "prior"  # calibrated on the trainer's first samples
    assert state.driver is None


def test_resume_goes_on_where_it_stopped(checkpoint, tmp_path):
    def train(folder, stop=None, resume=False):
        model, tokenizer = load(checkpoint)
        sparsity = always(mlp={"all": 0.5}, self_attn={}, start_step=3, end_step=8)
        model = FastSparseLanguageModel.get_peft_model(model, r=4, sparsity=sparsity, use_gradient_checkpointing=False)
        trainer = make_trainer(model, tokenizer, folder, save_strategy="steps", save_steps=5)
        if stop is not None:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step == stop

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if "loss" in log]

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop=5)
    resumed = train(tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / "checkpoint-5" / "sparsity_config.yaml").is_file()
    assert [log["sparsity/enabled"] for log in resumed[-5:]] == [1, 1, 1, 0, 0]
    assert [log["loss"] for log in resumed[-5:]] == pytest.approx([log["loss"] for log in whole[-5:]], abs=1e-4)


def test_an_adapter_is_loaded_with_its_sparsity(checkpoint, tmp_path, capsys):
    model, tokenizer = load(checkpoint)
    config = SparsityConfig.from_any(always())
    model = FastSparseLanguageModel.get_peft_model(model, r=4, sparsity=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    again, _ = load(str(tmp_path))
    assert "3 of 3 layers sparse" in capsys.readouterr().out
    assert get_state(again).config == config
    batch = make_batch()
    for each in (model, again):
        FastSparseLanguageModel.for_inference(each)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    FastSparseLanguageModel.for_training(again, use_gradient_checkpointing=False)
    FastSparseLanguageModel.for_training(model, use_gradient_checkpointing=False)
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
    assert all(parameter.requires_grad for name, parameter in again.named_parameters() if "lora_" in name)
    dense, _ = load(str(tmp_path), sparsity="dense")
    assert not get_state(dense).runtimes


def test_four_bit_is_the_default_and_trains(checkpoint, tmp_path):
    model, tokenizer = load(checkpoint, load_in_4bit=True)
    model = FastSparseLanguageModel.get_peft_model(model, r=4, sparsity=always())
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    trainer = make_trainer(model, tokenizer, tmp_path, max_steps=3, gradient_checkpointing=True)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(losses)))
    detach(model)


# -- Checkpoints of other kinds, with the PEFT backend -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt_oss", ["q_proj", "o_proj"]), ("falcon_h1", ["q_proj", "up_proj"]), ("qwen3_5_vl", ["q_proj", "up_proj"])],
    ids=["experts", "hybrid", "images"],
)
def test_checkpoints_of_other_kinds_are_loaded(family, targets, tmp_path):
    """With their own class, their processor, and LoRA on the text decoder alone."""
    save_checkpoint(tmp_path)
    kind = FAMILIES[family]
    base = (kind.build or causal)(kind)
    base.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if kind.inputs:
        images = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
        transformers.Qwen2_5_VLProcessor(*images).save_pretrained(tmp_path)
    model, processor = load(tmp_path)
    assert type(model) is type(base)
    assert isinstance(processor, transformers.ProcessorMixin) == bool(kind.inputs)
    assert getattr(processor, "tokenizer", processor).model_max_length == 64
    model = FastSparseLanguageModel.get_peft_model(model, r=4, target_modules=targets, sparsity="rows")
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted
    assert not [name for name in adapted if "visual" in name]
    with pytest.raises(BackendError, match="max_seq_length=200 is beyond the 128 positions"):
        load(tmp_path, max_seq_length=200)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5"])
def test_a_model_that_auto_cannot_predict_trains_as_it_is(family, capsys):
    """What a line says; what was set by hand is an error. Qwen3.5 is in part of the Llama kind."""
    base = causal(FAMILIES[family])
    plain = copy.deepcopy(base)
    model = FastSparseLanguageModel.get_peft_model(base, r=4, target_modules=["q_proj"])
    said = capsys.readouterr().out
    assert "sparse_unsloth auto: nothing is attached, the model trains as it is, exactly." in said
    assert "sparsity='rows'" in said
    assert get_state(model) is None
    batch = {name: value for name, value in make_batch().items() if name in ("input_ids", "labels")}
    assert model(**batch).loss.item() == plain(**batch).loss.item()
    with pytest.raises(AttachError, match="sparsity='rows'"):
        attach(copy.deepcopy(model), {"preset": "auto", "cuda_graphs": False})


def test_experts_train_through_trl_with_their_auxiliary_loss(tmp_path):
    """TRL asks every mixture for its router's logits."""
    save_checkpoint(tmp_path)
    causal(FAMILIES["mixtral"]).save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    model = FastSparseLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "o_proj"], sparsity="rows")
    trainer = make_trainer(model, tokenizer, tmp_path / "out", max_steps=2, gradient_checkpointing=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["sparsity/enabled"] for log in logs] == [1, 1]
    assert all(log["aux_loss"] > 0 for log in logs)


def test_a_multimodal_checkpoint_without_a_processor_says_so(tmp_path, caplog):
    save_checkpoint(tmp_path)
    kind = FAMILIES["qwen3_vl"]
    kind.build(kind).save_pretrained(tmp_path)
    _, tokenizer = load(tmp_path)
    assert not isinstance(tokenizer, transformers.ProcessorMixin)
    assert "No processor of images was loaded" in caplog.text


def test_a_gguf_file_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InstallError, match=r"gguf_file needs gguf, .*sparse-unsloth\[gguf\]"):
        FastSparseLanguageModel.from_pretrained("nowhere", backend="peft", gguf_file="model.gguf")
