"""The page needs nothing else, holds all that was seen, and nothing that a text holds can break it."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from conftest import make_perfect_sae

from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.errors import CorruptArtifact, InvalidConfig, InvalidData
from concept_unlearn.features import Choice, Inspection, inspect_features


@pytest.fixture
def seen(planted):
    return inspect_features(planted.lm, load_dictionary(planted.first), planted.scope, [3, 5], contexts=2)


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_fetches_nothing(seen):
    html = seen.html()
    assert not re.search(r"\b(src|href|srcset|action)=", html)
    assert not re.search(r"url\(|@import|<link|<img|<iframe|fetch\(|import\(", html)
    assert {*re.findall(r"https?://[^\s\"'<]+", html)} == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_page_holds_all_that_was_seen_and_the_choice_it_begins_with(seen):
    data = embedded(seen.html(Choice(keep=(3,), pinned=(5,))))
    assert data["features"] == [s.model_dump(mode="json") for s in seen.features]
    assert data["choice"] == {"keep": [3], "drop": [], "pinned": [5]}


def test_no_text_ends_the_script_or_becomes_markup(seen):
    nasty = "</script><img src=x onerror=alert(1)>"
    side = seen.features[0].forget
    contexts = (side.contexts[0].model_copy(update={"tokens": (nasty,), "acts": (1.0,), "peak": 0}),)
    shown = seen.features[0].model_copy(update={"forget": side.model_copy(update={"contexts": contexts})})
    html = seen.model_copy(update={"features": (shown,), "scope": nasty, "dictionary": nasty}).html()
    assert "<img" not in html
    assert embedded(html)["features"][0]["forget"]["contexts"][0]["tokens"] == [nasty]


def test_every_part_that_the_script_asks_for_is_on_the_page(seen):
    html = seen.html()
    ids = set(re.findall(r'id="([\w-]+)"', html))
    listed = re.search(r"=\n  \[(.*?)\]\.map\(\(id\) => document", html)[1]
    asked = set(re.findall(r'getElementById\("([\w-]+)"\)', html)) | set(re.findall(r'"([\w-]+)"', listed))
    assert asked <= ids


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(seen):
    frame = seen._repr_html_()
    assert unescape(re.search(r'srcdoc="(.*?)"', frame, re.DOTALL)[1]) == seen.html()


def test_an_inspection_survives_its_folder(seen, tmp_path):
    assert Inspection.load(seen.save(tmp_path / "seen")) == seen
    assert (tmp_path / "seen" / "inspection.html").read_text() == seen.html()


def test_a_folder_without_one_or_with_a_broken_one_is_said(seen, tmp_path):
    with pytest.raises(InvalidData, match="holds no inspection"):
        Inspection.load(tmp_path)
    (tmp_path / "inspection.json").write_text('{"model": 1, "odd": 2}')
    with pytest.raises(CorruptArtifact):
        Inspection.load(tmp_path)
    with pytest.raises(InvalidConfig, match=r"feature 9 .* was not looked at; the first that were: 3, 5"):
        seen.of(9)


def test_a_dictionary_with_a_page_on_neuronpedia_is_linked_and_listed(planted, tmp_path):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    sae.cfg.metadata.neuronpedia_id = "tiny-1m/0-res-16k"
    seen = inspect_features(planted.lm, SAEDictionary(sae), planted.scope, [3, 5]).labelled({5: "odd"}, by="somebody")
    assert embedded(seen.html())["neuronpedia"] == "https://www.neuronpedia.org/tiny-1m/0-res-16k"
    seen.save(tmp_path)
    assert json.loads((tmp_path / "neuronpedia.json").read_text()) == [
        {"modelId": "tiny-1m", "layer": "0-res-16k", "index": "3"},
        {"modelId": "tiny-1m", "layer": "0-res-16k", "index": "5", "description": "odd"},
    ]
    assert Inspection.load(tmp_path) == seen


@pytest.mark.parametrize("odd", [None, "", "gpt2-small", "a/b/c", "a/b?c=d", "https://elsewhere/b", "a/<b>"])
def test_a_dictionary_without_one_is_neither(seen, tmp_path, odd):
    seen = seen.model_copy(update={"neuronpedia_id": odd})
    assert seen.neuronpedia is None
    assert embedded(seen.save(tmp_path).joinpath("inspection.html").read_text())["neuronpedia"] is None
    assert not (tmp_path / "neuronpedia.json").exists()


def test_an_inspection_from_before_there_were_effects_and_labels_is_read(seen, tmp_path):
    old = seen.model_dump(mode="json", exclude={"labeller": True, "neuronpedia_id": True})
    old["features"] = [{k: v for k, v in s.items() if k not in ("effect", "label")} for s in old["features"]]
    (tmp_path / "inspection.json").write_text(json.dumps(old))
    assert Inspection.load(tmp_path) == seen
