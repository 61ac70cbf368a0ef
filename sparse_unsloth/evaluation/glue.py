"""Evaluates the held-out samples of a classification run by GLUE's metrics for the task."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import torch

from sparse_unsloth.data import classification
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.smollm2 import resolve_model
from sparse_unsloth.evaluation.model import EvaluationError, Source, load
from sparse_unsloth.evaluation.results import save_results
from sparse_unsloth.training.keys import SEQ_CLS


@torch.inference_mode()
def evaluate_glue(source: Source, folder: Path, *, limit: int | None = None, batch_size: int = 32) -> dict[str, Any]:
    """Scores a run's adapter and head on the data that its recipe holds out.

    Args:
        source, folder: what to evaluate, and where its results go.
        limit: the number of samples, from the first.
        batch_size: samples per batch.

    Returns:
        See `save_results`; items are samples: 1 or 0 for classes, the negative squared error for numbers.

    Raises:
        EvaluationError: the source is not a classification run; a bare model has no head.
        DataError: see `load_labelled`.
    """
    from transformers import AutoModelForSequenceClassification

    if source.recipe.get("lora_task_type") != SEQ_CLS or source.adapter is None:
        raise EvaluationError(
            f"{source.name}: the suite glue needs a run of a classification recipe (lora_task_type: {SEQ_CLS}), whose "
            "adapter brings the head."
        )
    known = {entry.name for entry in fields(DataArguments)}
    arguments = DataArguments(**{key: value for key, value in source.recipe.items() if key in known})
    train, test, columns = classification.load_labelled(arguments, evaluation=True)
    names = classification.label_names(train, test)
    test = test.select(range(min(limit or len(test), len(test))))
    hub = {"revision": source.recipe.get("model_revision", "main")}
    tokenizer = classification.load_tokenizer(source.model, **hub)
    encoded = classification.encode(test, columns, names, tokenizer, source.recipe.get("max_length", 1024))
    config = classification.model_config(resolve_model(source.model), names, tokenizer.pad_token_id, **hub)
    model, _ = load(source, auto_model=AutoModelForSequenceClassification, config=config)
    found = []
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        batch = tokenizer.pad({key: rows[key] for key in ("input_ids", "attention_mask")}, return_tensors="pt")
        found.append(model(**batch.to(model.device)).logits.float().cpu().numpy())
    predictions = classification.predictions_of(numpy.concatenate(found), names)
    labels = numpy.array(encoded["labels"])
    task = classification.task_of(arguments)
    scores = classification.score(classification.metrics_for(task, names), predictions, labels)
    single = -((predictions - labels) ** 2) if names is None else predictions == labels
    items = {str(number): float(value) for number, value in enumerate(single)}
    return save_results(folder, "glue", source.name, scores, items, task=task, samples=len(labels))
