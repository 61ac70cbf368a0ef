"""Tests small versions of cases that users of Unsloth, TRL, PEFT, transformers, LLaMA-Factory and axolotl reported.

Each names its report: something else than intended was trained, saved or evaluated, without a message.
"""

import json
import shutil

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sparse_unsloth import FastSparseLanguageModel, attach
from sparse_unsloth.cli import main
from sparse_unsloth.data.templates import not_written
from sparse_unsloth.errors import DataError
from sparse_unsloth.evaluation.model import find_source, load
from sparse_unsloth.evaluation.mt_bench import export_model

import tiny_models
import word_models
from word_models import questions, text

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = {"backward_rows": 0.999}
CHANNELS = {"mlp": {"all": 0.0001}, "estimator": {"kind": "svd"}, "start_step": 0, "end_step": 1.0}
BARE = "{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return word_models.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def training(checkpoint, tmp_path, monkeypatch):
    """Trains one step on rows; returns the exit code and the facts of the data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = {
        "model_name_or_path": checkpoint, "backend": "peft", "bf16": False, "use_cpu": True, "max_steps": 1,
        "per_device_train_batch_size": 2, "lora_r": 4, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "report_to": "none", "sparsity": "dense", "max_length": 64,
    }  # fmt: skip
    runs = iter(range(9))

    def run(rows, template=None, **changes):
        folder = tmp_path / f"run{next(runs)}"
        if template is not None:
            (tmp_path / "template.jinja").write_text(template)
            changes["chat_template_path"] = str(tmp_path / "template.jinja")
        source = word_models.save_recipe(
            tmp_path / "recipe.yaml", recipe | {"output_dir": str(folder)},
            dataset_name=word_models.save_rows(tmp_path / f"{folder.name}.jsonl", rows), **changes,
        )  # fmt: skip
        code = main(["train", source])
        metrics = folder / "metrics.json"
        return code, json.loads(metrics.read_text())["data"]["facts"] if metrics.is_file() else None

    return run


def lora(base=None, lora_b=0.05, **options):
    base = tiny_models.make_base() if base is None else base
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, lora_b)
    return model.train()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("sparse_unsloth")]


def turns(*pairs, **keys):
    return [{"role": role, "content": content, **(keys if role == "assistant" else {})} for role, content in pairs]


# -- Texts that do not say what was meant -----------------------------------------------------------------------------


def test_texts_without_an_end_are_counted(training):
    """unslothai/unsloth#416, huggingface/trl#1623: TRL ends texts only where their column is called text."""
    code, facts = training([{"content": text(5)}] * 4, dataset_text_field="content")
    assert code == 0
    assert any(fact.startswith("4 of 4 samples: no special token ends the text") for fact in facts)
    code, facts = training([{"text": text(5)}] * 4)
    assert (code, facts) == (0, ["columns used: text from text"])


def test_a_template_without_an_end_is_told(training):
    """huggingface/trl#2059."""
    code, facts = training(questions([(3, 2)] * 6), BARE.replace(" <end>", ""), packing=True)
    assert code == 0
    assert any(fact.startswith("6 of 6 samples: no special token ends the text") for fact in facts)


def test_two_beginnings_are_counted(training, checkpoint, tokenizer, tmp_path):
    """unslothai/unsloth#2648, huggingface/trl#1400: the text has the token, and the tokenizer adds it."""
    from tokenizers import processors

    shutil.copytree(checkpoint, tmp_path / "begins")
    begins = transformers.AutoTokenizer.from_pretrained(checkpoint)
    begins.bos_token = "nine"
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="nine $A", special_tokens=[("nine", begins.bos_token_id)]
    )
    begins.save_pretrained(tmp_path / "begins")
    rows = [{"text": "nine " + text(4)}] * 3 + [{"text": text(4)}]
    code, facts = training(rows, model_name_or_path=str(tmp_path / "begins"))
    assert code == 0
    assert any(fact.startswith("3 of 4 samples: the token that begins a sequence stands there twice") for fact in facts)


def test_unknown_words_are_counted(training):
    """No report of its own; it is seen where the two above are."""
    code, facts = training([{"question": "what", "answer": "one"}, {"question": "two", "answer": "one"}] * 2)
    assert code == 0
    assert any(fact.startswith("2 of 4 samples: the tokenizer does not know part of the text") for fact in facts)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": turns(("system", "nine"), ("user", "one"), ("assistant", "two"))}, "the system turn"),
        ({"messages": turns(("user", "one"), ("assistant", "two"), thinking="nine")}, "'thinking' of the turns"),
        ({"messages": turns(("user", "one"), ("assistant", "two"), loss=False)}, "'loss' of the turns"),
        ({"prompt": turns(("user", "one")), "completion": turns(("assistant", "two")), "tools": [{"name": "add"}]},
         "the tools"),
    ],
)  # fmt: skip
def test_what_a_template_passes_over_is_named(tokenizer, row, name):
    """axolotl-ai-cloud/axolotl#1671 (system), huggingface/trl#6259 (tools), #6361 (thoughts), LlamaFactory#10471."""
    bare = BARE.replace("<user>", "{% if m['role'] != 'system' %}<user>").replace("<end>", "<end>{% endif %}")
    (fact,) = not_written([row] * 3, tokenizer, bare)
    assert fact.startswith(f"the chat template does not write {name}")
    whole = BARE.replace("<user>", "{{ m }} {{ tools }}") + "{% if add_generation_prompt %}{% endif %}"
    assert not_written([row] * 3, tokenizer, whole) == []
    assert not_written([{"prompt": "one", "completion": "two"}, row], tokenizer, bare) == []


def test_a_prompt_that_a_template_writes_otherwise_is_told_each_time(training):
    """huggingface/trl#5213: TRL says so once, and not at all where the tokens come out of the cache."""
    template = word_models.TEMPLATE.replace("%}<assistant> {% endif %}", "%}<assistant> nine {% endif %}")
    for _ in range(2):
        code, facts = training(questions([(3, 2)] * 4), template)
        assert code == 0
        assert any("a prompt that waits for its answer otherwise" in fact for fact in facts)


def test_contents_in_parts_are_texts(training):
    """ml-explore/mlx-examples#1195: templates of text models write a list of parts as Python does."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    image = [{"type": "image"}, {"type": "text", "text": "one"}]
    rows = [{"messages": turns(("user", content), ("assistant", "three"))} for content in (parts, parts, image)]
    code, facts = training(rows)
    assert code == 0
    assert "1 of 3 samples left out: 1 with a part of a turn that is no text (image)" in facts
    assert not any("does not know part of the text" in fact for fact in facts)


# -- Keys that would do nothing ---------------------------------------------------------------------------------------


def test_completion_only_needs_completions(training, capsys):
    """huggingface/trl#1507, huggingface/open-r1#648: the loss is on every token where there are none."""
    rows = [{"messages": turns(("user", "one"), ("assistant", "two"))}] * 4
    assert training(rows, completion_only_loss=True) == (2, None)
    assert "have no completion (messages), so every token would be a loss token" in capsys.readouterr().err


def test_a_training_without_a_batch_is_refused(training, capsys):
    """RUC-GSAI/YuLan-IR#5: "not a single sample in your epoch_iterator", and an adapter that was never trained."""
    rows = questions([(3, 2)] * 3)
    assert training(rows, per_device_train_batch_size=8, dataloader_drop_last=True) == (2, None)
    assert "its 3 training samples are less than a batch (8 on each of 1 processes)" in capsys.readouterr().err


def test_a_warm_up_that_outlasts_the_training_is_told(training, caplog):
    """axolotl-ai-cloud/axolotl#2897."""
    training(questions([(3, 2)] * 4), warmup_steps=100, max_steps=2)
    assert sum("warms up for 100 steps, and the training has 2" in line for line in said(caplog)) == 1
    caplog.clear()
    training(questions([(3, 2)] * 4), warmup_steps=1, max_steps=2)
    assert not any("warms up" in line for line in said(caplog))


def test_samples_held_out_for_nothing_are_told(training):
    """huggingface/trl#2203, unslothai/unsloth#1866: there is an evaluation set, and nothing is evaluated."""
    _, facts = training(questions([(3, 2)] * 8), dataset_test_size=3)
    assert any(fact.startswith("3 samples are held out (dataset_test_size), and this run does not") for fact in facts)
    _, facts = training(questions([(3, 2)] * 8), dataset_test_size=3, do_eval=True)
    assert not any("are held out" in fact for fact in facts)


def test_label_smoothing_with_a_loss_that_fails_is_refused(training, capsys):
    """huggingface/transformers#10309 in a new form: TRL's chunked loss has no outputs that smoothing could use."""
    assert training(questions([(3, 2)] * 4), label_smoothing_factor=0.1, loss_type="chunked_nll") == (2, None)
    assert "Give loss_type: nll" in capsys.readouterr().err


# -- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    word_models.save_checkpoint(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def from_adapter(adapter):
    options = {"load_in_4bit": False, "backend": "peft", "device_map": "cpu"}
    return FastSparseLanguageModel.from_pretrained(str(adapter), max_seq_length=64, **options)[0]


def renamed(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.replace("model.layers", "model.text.layers"): tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, "holds no values for 42 tensors of the model's adapter"),
        (lambda adapter: word_models.save_checkpoint(adapter.parent / "base", num_hidden_layers=4),
         "holds no values for 14 tensors"),
        (lambda adapter: word_models.save_checkpoint(adapter.parent / "base", num_hidden_layers=2),
         "14 of its 42 tensors have no place in the model"),
        (lambda adapter: word_models.save_checkpoint(adapter.parent / "base", hidden_size=32),
         "does not fit its base model"),
    ],
)  # fmt: skip
def test_an_adapter_that_fits_in_part_is_refused(adapter, damage, message):
    """huggingface/peft#2699, #2566, #1932: what has no value begins anew, and what has no place is dropped."""
    assert len(tiny_models.loras(from_adapter(adapter))) == 42
    damage(adapter)
    with pytest.raises(DataError, match=message):
        from_adapter(adapter)
    with pytest.raises(DataError, match=message):
        load(find_source(str(adapter)))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_on_tied_embeddings_is_judged_as_trained(tmp_path, tokenizer, targets):
    """unslothai/unsloth#9331, huggingface/peft#2777: merged, the adapter of one would change both."""
    word_models.save_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lora(base, target_modules=targets).eval()
    with torch.no_grad():
        for parameter in tiny_models.loras(model).values():
            parameter.normal_(0, 0.1)
    ids = torch.tensor([[4, 5, 6, 7]])
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    source = find_source(str(tmp_path / "adapter"))
    torch.testing.assert_close(load(source)[0](input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    exported = transformers.AutoModelForCausalLM.from_pretrained(export_model(source, tmp_path / "merged", True))
    torch.testing.assert_close(exported(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [ROWS, CHANNELS])
def test_an_adapter_loaded_for_use_is_not_trained_without_a_word(tmp_path, config, caplog):
    """huggingface/peft#282, #1340, huggingface/trl#6700: ``is_trainable`` is False by default."""
    lora().save_pretrained(tmp_path)
    for trainable in (True, False):
        model = PeftModel.from_pretrained(tiny_models.make_base(), tmp_path, is_trainable=trainable)
        attach(model, config)
        with torch.no_grad():
            model.train()(**tiny_models.make_batch())
        assert said(caplog) == []
        model.train()(**tiny_models.make_batch())
        assert sum("no tensor of the model is trained" in line for line in said(caplog)) == (not trainable)


def test_trained_tensors_that_are_not_saved_are_named(tmp_path, caplog):
    """artidoro/qlora#214: embeddings are trained, and no part of the adapter."""
    model = lora(modules_to_save=["norm"])
    attach(model, ROWS)
    model.save_pretrained(tmp_path / "whole")
    assert said(caplog) == []
    model.get_input_embeddings().weight.requires_grad_(True)
    model.save_pretrained(tmp_path / "part")
    (line,) = said(caplog)
    assert line.startswith("1 trained tensors are not part of the adapter")
    assert "embed_tokens.weight" in line
    caplog.clear()
    biases = lora(tiny_models.make_base("qwen2"), bias="all")
    attach(biases, {"backward_rows": 0.999})
    biases.save_pretrained(tmp_path / "biases")
    assert said(caplog) == []


def test_training_in_evaluation_mode_is_told(caplog):
    """huggingface/transformers#24463: a loaded adapter is in evaluation mode until somebody calls train()."""
    model = lora().eval()
    attach(model, ROWS)
    with torch.no_grad():
        model(**tiny_models.make_batch())
    model(**tiny_models.make_batch())
    assert said(caplog) == []
    for _ in range(2):
        model(**tiny_models.make_batch()).loss.backward()
    assert [line for line in said(caplog) if "in evaluation mode, where everything is dense" in line] == said(caplog)
    assert len(said(caplog)) == 1


# -- Right already ----------------------------------------------------------------------------------------------------


def packed(batch):
    """The batch as one row of documents, told by their positions."""
    kept = [batch["attention_mask"][row].bool() for row in range(3)]
    ids = [batch["input_ids"][row, mask] for row, mask in enumerate(kept)]
    positions = [torch.arange(len(document)) for document in ids]
    labels = torch.cat([batch["labels"][row, mask] for row, mask in enumerate(kept)])
    return {
        "input_ids": torch.cat(ids)[None], "labels": labels[None], "position_ids": torch.cat(positions)[None],
        "use_cache": False,
    }  # fmt: skip


@pytest.mark.parametrize("config", [ROWS, CHANNELS], ids=["rows", "channels"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},  # unslothai/unsloth#9326
        {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},  # unslothai/unsloth#500
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},  # huggingface/peft#3582
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [3, 4]},  # huggingface/peft#2898
    ],
    ids=lambda options: next(iter(options)),
)
def test_gradients_of_what_else_is_trained(config, options):
    whole, gradients = tiny_models.loss_and_gradients(lora(**options), tiny_models.make_batch())
    model = lora(**options)
    attach(model, config)
    loss, ours = tiny_models.loss_and_gradients(model, tiny_models.make_batch())
    torch.testing.assert_close(loss, whole)
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_packed_documents_do_not_see_each_other():
    """huggingface/trl#1230, #805: without FlashAttention too."""
    batch = tiny_models.make_batch()
    model = lora()
    attach(model, ROWS)
    whole, gradients = tiny_models.loss_and_gradients(lora(), batch)
    loss, ours = tiny_models.loss_and_gradients(model, packed(batch))
    torch.testing.assert_close(loss, whole)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_sample_without_loss_beside_others_and_accumulated_batches():
    """huggingface/transformers#35204, #37766; unslothai/unsloth#1128."""
    batch = tiny_models.make_batch()
    batch["labels"][1] = -100
    batch["num_items_in_batch"] = torch.tensor(24)
    whole, gradients = tiny_models.loss_and_gradients(lora(), batch)
    model = lora()
    attach(model, ROWS)
    loss, ours = tiny_models.loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, whole)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_lora_of_a_loaded_adapter_is_not_begun_anew(adapter):
    """huggingface/lerobot#3459: the resumed adapter was wrapped in another one, and lost."""
    model = from_adapter(adapter)
    with pytest.raises(Exception, match="The model has adapters already"):
        FastSparseLanguageModel.get_peft_model(model, r=8)


def test_roles_in_capitals(training):
    """hiyouga/LlamaFactory#9493, axolotl-ai-cloud/axolotl#2123: other names of roles, and every sample was dropped."""
    rows = [{"conversations": [{"from": "Human", "value": text(3)}, {"from": "GPT", "value": text(2)}]}] * 4
    assert training(rows, assistant_only_loss=True) == (0, ["columns used: text from conversations"])
