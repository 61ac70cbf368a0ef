"""Pushing an attached model to the hub sends a plain model's files and its sparsity; the hub is a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers.utils import hub

from sparse_unsloth import SparsityConfig, attach, detach
from sparse_unsloth.attachment import CONFIG_NAME

from tiny_models import make_lora

SPARSITY = {"preset": "o2", "estimator": {"kind": "svd"}}


@pytest.fixture
def pushed(monkeypatch):
    """A function that pushes a model and returns the files that would go out, by name."""

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    sent = {}

    def upload(self, folder, repo_id, **kwargs):
        assert repo_id == "someone/adapter"
        sent.update({file.name: file.read_bytes() for file in Path(folder).iterdir()})

    account = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "hf_api", lambda: account, raising=False)
    monkeypatch.setattr(hub, "create_repo", account.create_repo, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)

    def push(model):
        sent.clear()
        model.push_to_hub("someone/adapter")
        return dict(sent)

    return push


def test_an_attached_model_pushes_what_a_plain_one_pushes(pushed):
    model = make_lora()
    plain = pushed(model)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= plain.keys()
    attributes = {name: value for name, value in vars(model).items() if callable(value)}
    attach(model, SPARSITY)
    attached = pushed(model)
    assert SparsityConfig.from_any(yaml.safe_load(attached.pop(CONFIG_NAME))) == SparsityConfig.from_any(SPARSITY)
    assert attached == plain
    detach(model)
    assert pushed(model) == plain
    assert {name: value for name, value in vars(model).items() if callable(value)} == attributes
