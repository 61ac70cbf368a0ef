import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run folders of a dense causal model in the Alpaca form, and of a classifier, as `train` leaves them."""
    from sparse_unsloth.training.recipe import load_recipe
    from sparse_unsloth.training.run import run

    import word_models

    folder = tmp_path_factory.mktemp("runs")
    checkpoint = word_models.save_checkpoint(folder / "model", max_position_embeddings=4096)
    common = [
        "--model_name_or_path", checkpoint, "--use_cpu", "--bf16", "false", "--dtype", "float32", "--max_steps", "2",
        "--save_strategy", "no", "--sparsity", "dense", "--lora_r", "2", "--disable_tqdm", "--gradient_checkpointing",
        "false", "--learning_rate", "0.5", "--dataset_test_size", "6",
    ]  # fmt: skip
    rows = [{"instruction": word_models.text(4), "output": word_models.text(2)} for _ in range(20)]
    file = word_models.save_rows(folder / "rows.jsonl", rows)
    run(load_recipe("math10k", [*common, "--dataset_name", file, "--output_dir", str(folder / "text")]))
    rows = [
        {"sentence1": word_models.text(1 + i % 5), "sentence2": word_models.text(3), "label": i % 2} for i in range(20)
    ]
    file = word_models.save_rows(folder / "rte.jsonl", rows)
    run(load_recipe("glue-rte", [*common, "--dataset_name", file, "--output_dir", str(folder / "glue")]))
    return folder
