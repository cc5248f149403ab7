"""The page of errors: each error class has its place there, and the message shown is what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Planted, make_hf, make_tokenizer

from concept_unlearn import errors
from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.dictionaries.base import check_width
from concept_unlearn.dictionaries.sae import certificate
from concept_unlearn.edits import Clamp, Edit
from concept_unlearn.evaluation.attacks import Quantise
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.remote import RemoteLogits
from concept_unlearn.methods import Finetune
from concept_unlearn.patches import FeaturePatch, load_patch

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
SECTIONS = {part.partition("\n")[0].strip(): part for part in PAGE.read_text().split("\n## ")[1:]}
CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and issubclass(found, errors.ConceptUnlearnError)
}


def scope_of_text(planted):
    Path("mine.jsonl").write_text('{"text": "A passage."}\n{"txt": "Another."}\n')
    Scope.load("mine.jsonl")


def of_another_width(planted):
    shutil.copytree(planted.second, "mine")
    check_width(load_dictionary("mine"), torch.zeros(1, 576))


def folder_without_dictionary(planted):
    Path("dictionaries/mine").mkdir(parents=True)
    load_dictionary("dictionaries/mine")


def not_a_number(planted):
    model = make_hf()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    lm = LM(model, make_tokenizer(), name="models/mine")
    ids = torch.tensor([[7, 8]])
    lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), Site("resid_post", 1))


def goes_astray(planted):
    Finetune(objectives=("ga", "retain_nll"), lr=3.0, batch_size=4, max_steps=20)(planted.lm, planted.scope)


def saved_patch(planted):
    patch = FeaturePatch(dictionary=load_dictionary(planted.second), features=(3, 5), edit=Clamp(to=-50.0, above=-1e9))
    patch.save("patches/mine", planted.lm)


def another_base(planted):
    saved_patch(planted)
    load_patch("patches/mine", LM(make_hf(seed=1), make_tokenizer(), name="models/mine"))


def canary_is_silent(planted):
    saved_patch(planted)
    load_patch("patches/mine", LM(make_hf(seed=1), make_tokenizer(), name="models/mine"), any_base=True)


def nobody_listens(planted):
    model = RemoteLogits("http://127.0.0.1:9", "big", vocabulary=48)
    LM(model, make_tokenizer(), name="big").logits(torch.tensor([[7, 8]]))


PROVOKED: dict[str, Callable[[Planted], object]] = {
    "UnknownName": lambda _: Edit.parse("zreo"),
    "InvalidConfig": lambda _: Edit.parse({"kind": "clamp", "too": -50}),
    "ModelNotFound": lambda _: LM.load("smollm2"),
    "SiteNotFound": lambda planted: planted.lm.locate(Site("resid_post", 40)),
    "DictionaryMismatch": of_another_width,
    "NotExact": lambda _: certificate("temporal"),
    "InvalidData": scope_of_text,
    "EmptyData": lambda _: Scope.of("mine", forget=[]),
    "NonFinite": not_a_number,
    "Diverged": goes_astray,
    "PatchMismatch": another_base,
    "PatchNotReached": canary_is_silent,
    "EndpointFailed": nobody_listens,
    "CorruptArtifact": folder_without_dictionary,
    "MissingExtra": lambda _: Quantise(bits=4).tampered(None),
}


def plain(text):
    """Of a message what does not depend on this machine's rounding: numbers and fingerprints are all alike."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", text)
    return " ".join(re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", text).split())


def test_every_error_has_its_place_in_the_order_of_the_tree():
    assert list(SECTIONS) == [name for name in CLASSES if name != "ConceptUnlearnError"]
    assert "ConceptUnlearnError" in PAGE.read_text()


def test_the_tree_in_the_docstring_names_every_error_once():
    assert re.findall(r"^[│├└─ ]*(\w+)", errors.__doc__.partition("\n\n")[2], re.M) == [
        "ConceptUnlearnError", *(name for name in CLASSES if name != "ConceptUnlearnError"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_a_place_says_what_it_means_shows_one_and_how_to_mend_it(name):
    meaning, shown, mending = re.split("```(?:text)?", SECTIONS[name])
    assert len(meaning.split()) > 8
    assert shown.strip().startswith(f"{name}: ")
    assert len(mending.split()) > 8


@pytest.mark.parametrize("name", PROVOKED)
def test_the_message_shown_is_what_the_code_says(name, planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "ModelNotFound":
        monkeypatch.setenv("CONCEPT_UNLEARN_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    if name in ("ModelNotFound", "MissingExtra"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CLASSES[name]) as caught:
        PROVOKED[name](planted)
    assert type(caught.value) is CLASSES[name]
    assert plain(re.split("```(?:text)?", SECTIONS[name])[1]) == plain(f"{name}: {caught.value}")


def test_every_error_is_provoked():
    assert set(PROVOKED) == set(SECTIONS)
