"""Tests sequence classification: roles, exact gradients of the masked forward, labels, metrics."""

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value

from sparse_unsloth.attachment import attach, get_state
from sparse_unsloth.channels.calibration import _Runs
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.classification import encode, label_names, load_labelled, metrics_for, model_config, score
from sparse_unsloth.errors import BackendError, ConfigError, DataError
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition, partition_of, pooled_positions

import word_models
from classifier_models import PAD, make_batch, make_classifier
from masked_models import assert_gradients_close, masked_by_hooks
from tiny_models import always, loss_and_gradients


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("masked", [True, False])
def test_roles_by_hand(side, masked):
    batch = make_batch(side)
    mask = batch["attention_mask"] if masked else None
    partition = TokenPartition.from_sequences(batch["input_ids"], mask, PAD)
    last = [8, 4, 6] if side == "right" else [8, 8, 8]
    assert partition.dense.tolist() == partition.loss.tolist() == [9 * row + place for row, place in enumerate(last)]
    real = batch["attention_mask"].flatten().nonzero().flatten().tolist()
    if masked or side == "right":
        assert partition.context.tolist() == [row for row in real if row not in partition.dense.tolist()]
    else:
        assert partition.num_padding == 0, "without a mask, tokens attend to padding on their left"
    none = TokenPartition.from_sequences(batch["input_ids"], mask, PAD, dense_tokens="none")
    assert none.num_dense == 0
    assert none.loss.tolist() == partition.loss.tolist()
    assert none.num_context == partition.num_context + 3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [PAD, None])
def test_the_pooled_row_is_the_one_that_the_head_reads(side, pad):
    """Only that row's final state moves the logits."""
    batch = make_batch(side) if pad is not None else {**make_batch(lengths=(9, 9, 9))}
    model = make_classifier().get_base_model().eval()
    model.config.pad_token_id = pad
    rows = slice(0, 3) if pad is not None else slice(0, 1)
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    states = []

    def keep(module, args, output):
        states.append(output)
        output.retain_grad()

    model.model.norm.register_forward_hook(keep)
    model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    moved = states[0].grad.abs().sum(-1) > 0
    assert moved.sum(1).tolist() == [1] * len(ids)
    assert moved.int().argmax(1).tolist() == pooled_positions(ids, pad).tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dense_tokens", ["output", "none"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sparse_classifier_equals_masked_classifier(family, dense_tokens, side):
    sparse, masked, plain = (make_classifier(family) for _ in range(3))
    batch, contexts = make_batch(side), []
    attach(sparse, always(dense_tokens=dense_tokens))
    sparse.register_forward_pre_hook(
        lambda module, args, kwargs: contexts.append(kwargs["sparse_context"]), with_kwargs=True
    )
    loss, gradients = loss_and_gradients(sparse, batch)
    context = contexts[0]
    assert isinstance(context, SparseContext)
    assert context.partition.num_dense == (3 if dense_tokens == "output" else 0)
    assert context.partition.num_padding == 6
    masked_by_hooks(masked, context.selections, context.partition)
    masked_loss, masked_gradients = loss_and_gradients(masked, batch)
    torch.testing.assert_close(loss, masked_loss)
    assert_gradients_close(gradients, masked_gradients, rtol=1e-4, atol=1e-6)
    assert any("score" in name for name in gradients), "the head is trained"
    plain_loss, _ = loss_and_gradients(plain, batch)
    assert (loss - plain_loss).abs() > 1e-5, "something was left out"


def test_regression_and_several_labels_train_sparsely():
    for labels, count in ((torch.tensor([0.5, 2.0, 1.0]), 1), (torch.rand(3, 4), 4)):
        model = make_classifier(num_labels=count)
        attach(model, always())
        loss, _ = loss_and_gradients(model, {**make_batch(), "labels": labels})
        assert loss.isfinite()
        assert get_state(model).ran


def test_classifier_is_dense_in_evaluation():
    sparse, plain = make_classifier(), make_classifier()
    attach(sparse, always())
    batch = make_batch()
    torch.testing.assert_close(sparse.eval()(**batch).logits, plain.eval()(**batch).logits, rtol=0, atol=0)


def test_calibrated_estimators_take_classification_batches():
    model = make_classifier()
    attach(model, always(estimator={"kind": "prior"}), calibration_samples=[make_batch(), make_batch("left")])
    loss, _ = loss_and_gradients(model, make_batch())
    assert loss.isfinite()


def test_calibration_counts_context_rows_without_first_tokens():
    runs = _Runs(make_classifier(), [make_batch()], "output", progress=False)
    assert runs.rows == 9 + 5 + 7 - 3 - 3
    assert _Runs(make_classifier(), [make_batch()], "none", progress=False).rows == 9 + 5 + 7 - 3


def test_embeddings_without_tokens_are_refused():
    with pytest.raises(ConfigError, match="called without input_ids"):
        partition_of(make_classifier(), Batch(torch.tensor([1]), inputs_embeds=torch.zeros(1, 2, 64)))


# -- Data and metrics -------------------------------------------------------------------------------------------------


def data(tmp_path, rows, **changes):
    return DataArguments(**{"dataset_name": word_models.save_rows(tmp_path / "rows.jsonl", rows), **changes})


def test_rows_without_a_label_are_left_out(tmp_path):
    rows = [{"sentence": str(i), "label": -1 if i < 2 else i % 2} for i in range(8)]
    train, test, columns = load_labelled(data(tmp_path, rows, dataset_test_size=2), evaluation=True)
    assert (len(train), len(test), columns) == (4, 2, ["sentence"])


def test_label_names():
    def of(values, feature=None):
        features = None if feature is None else Features({"label": feature})
        return Dataset.from_dict({"label": values}, features=features)

    assert label_names(of([0, 2]), None) == ["0", "1", "2"]
    assert label_names(of(["b", "a"]), None) == ["a", "b"]
    assert label_names(of([1.5, 2.0]), None) is None
    assert label_names(of([1, 0], ClassLabel(names=["no", "yes"])), None) == ["no", "yes"]
    assert label_names(of([0.0], Value("float32")), None) is None
    with pytest.raises(DataError, match="one label only, 'a'"):
        label_names(of(["a"]), None)
    with pytest.raises(DataError, match="held-out label 'c' does not occur"):
        label_names(of(["a", "b"]), of(["c"]))


def test_encoding_joins_two_texts_and_cuts(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(word_models.save_checkpoint(tmp_path))
    rows = Dataset.from_list([{"left": "one two", "right": "three", "label": "b", "idx": 7}])
    encoded = encode(rows, ["left", "right"], ["a", "b"], tokenizer, 2)
    assert encoded.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"] or "labels" in encoded[0]
    assert encoded[0]["labels"] == 1
    assert len(encoded[0]["input_ids"]) == 2
    assert encode(Dataset.from_list([{"left": "one", "label": 2}]), ["left"], None, tokenizer, None)[0]["labels"] == 2.0


def test_head_of_the_configuration(tmp_path):
    checkpoint = word_models.save_checkpoint(tmp_path)
    config = model_config(checkpoint, ["no", "yes", "maybe"], pad_token_id=5)
    assert (config.num_labels, config.id2label[2], config.pad_token_id) == (3, "maybe", 5)
    regression = model_config(checkpoint, None, pad_token_id=5)
    assert (regression.num_labels, regression.problem_type) == (1, "regression")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_columns": ["sentence", "other"]}, "has no column other; its columns are"),
        ({"dataset_columns": ["a", "b", "c"]}, "reads one or two text columns"),
        ({"dataset_filters": ["no-refusal"]}, "dataset_filters: is for text generation"),
        ({"dataset_drop_long": True}, "dataset_drop_long: is for text generation"),
    ],
)
def test_wrong_data(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_labelled(data(tmp_path, [{"sentence": "a", "label": 1}] * 3, **changes), evaluation=False)


def test_columns_that_are_missing(tmp_path):
    with pytest.raises(DataError, match=r"columns are words, label\. A classifier needs label and one of: sentence;"):
        load_labelled(data(tmp_path, [{"words": "a", "label": 1}]), evaluation=False)
    with pytest.raises(DataError, match="has no column label"):
        load_labelled(data(tmp_path, [{"sentence": "a"}]), evaluation=False)
    with pytest.raises(DataError, match="the training split has no row with a label"):
        load_labelled(data(tmp_path, [{"sentence": "a", "label": -1}]), evaluation=False)


def test_metrics_by_hand():
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("sklearn")
    given, wanted = numpy.array([1, 1, 0, 0, 1]), numpy.array([1, 0, 0, 1, 1])
    found = score(("accuracy", "f1", "matthews_correlation"), given, wanted)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # true positives 2, true negatives 1, false positives 1, false negatives 1
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    numbers = score(("pearson", "spearman"), numpy.array([1.0, 2.0, 9.0]), numpy.array([0.0, 1.0, 2.0]))
    assert numbers["spearman"] == pytest.approx(1)
    assert 0.9 < numbers["pearson"] < 1
    assert score(("pearson",), numpy.array([1.0, 1.0]), numpy.array([0.0, 1.0])) == {"pearson": 0.0}


def test_metrics_of_tasks():
    assert metrics_for("mrpc", ["0", "1"]) == ("accuracy", "f1")
    assert metrics_for("mine", ["a", "b", "c"]) == ("accuracy",)
    assert metrics_for(None, None) == ("pearson", "spearman")


def test_unsloth_has_no_heads(tmp_path):
    from sparse_unsloth.training.recipe import load_recipe
    from sparse_unsloth.training.run import build_trainer

    words_ = ["--use_cpu", "--bf16", "false", "--backend", "unsloth", "--output_dir", str(tmp_path)]
    with pytest.raises(BackendError, match="no fast path for classification heads"):
        build_trainer(load_recipe("glue-rte", words_))


@pytest.mark.parametrize("command", ["estimate", "calibrate"])
def test_what_takes_no_classifier_says_so(command, tmp_path, capsys):
    from sparse_unsloth.cli import main

    words_ = [command, "glue-rte", "--use_cpu", "true", "--bf16", "false"]
    assert main([*words_, *(["--output-dir", str(tmp_path)] if command == "calibrate" else [])]) == 2
    assert "(SEQ_CLS)" in capsys.readouterr().err
