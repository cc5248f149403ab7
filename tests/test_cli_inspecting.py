"""The verbs that show."""

from __future__ import annotations

import json

import pytest
from test_cli import shell

from concept_unlearn.cli.inspecting import inspect
from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig
from concept_unlearn.features import Choice, Inspection
from concept_unlearn.lm import LM
from concept_unlearn.patches import FeaturePatch


@pytest.fixture
def common(workplace):
    return (
        "--model", workplace / "model", "--scope", workplace / "scope", "--dictionary", workplace / "dictionary",
    )  # fmt: skip


def test_inspect_shows_features_by_number_and_writes_the_page(common, tmp_path):
    out = shell("inspect", *common, "--features", "3, 17", "--output", tmp_path / "seen", "--contexts", 2)
    assert "inspection.html" in out
    assert [s.feature for s in Inspection.load(tmp_path / "seen").features] == [3, 17]


def test_inspect_chooses_by_score_where_no_feature_is_named(common, tmp_path):
    shell("inspect", *common, "--score", "mean_difference", "--n", 4, "--output", tmp_path)
    assert len(Inspection.load(tmp_path).features) == 4


def test_inspect_goes_on_from_a_choice(common, tmp_path):
    Choice(keep=(3,), drop=(5,), dictionary="dictionary").save(tmp_path / "choice.yaml")
    shell("inspect", *common, "--choice", tmp_path / "choice.yaml", "--output", tmp_path)
    assert [s.feature for s in Inspection.load(tmp_path).features] == [3, 5]
    assert '"choice":{"keep":[3],"drop":[5],"pinned":[]}' in (tmp_path / "inspection.html").read_text()


def test_inspect_measures_each_feature_alone_where_it_is_asked_to(common, tmp_path):
    shell("inspect", *common, "--features", "3", "--output", tmp_path)
    assert Inspection.load(tmp_path).features[0].effect is None
    out = shell(
        "inspect", *common, "--features", "3", "--effects", "--edit", "{kind: clamp, to: -9}", "--output", tmp_path
    )
    assert "alone" in out
    assert Inspection.load(tmp_path).features[0].effect.edit == {"kind": "clamp", "to": -9.0, "above": 0.0}


def test_inspect_keeps_what_it_saw_where_labels_fail(common, workplace, tmp_path):
    settings = {
        "model": str(workplace / "model"), "scope": str(workplace / "scope"),
        "dictionary": str(workplace / "dictionary"), "output": tmp_path, "features": "3",
    }  # fmt: skip
    with pytest.raises(InvalidConfig, match="both --label-url and --label-model"):
        inspect(**settings, label_url="http://127.0.0.1:9/v1")
    with pytest.raises(InvalidConfig, match=r"should be in \$NO_SUCH_KEY"):
        inspect(**settings, label_url="http://127.0.0.1:9/v1", label_model="tiny", label_key_env="NO_SUCH_KEY")
    assert Inspection.load(tmp_path).features[0].label is None


def test_unlearn_takes_the_choice(common, workplace, tmp_path):
    path = Choice(keep=(3,), dictionary="dictionary").save(tmp_path / "choice.yaml")
    shell("unlearn", *common, "--choice", path, "--n", 1, "--grid", 2, "--keep", 0.5, "--output", tmp_path / "patch")
    made = json.loads((tmp_path / "patch" / "config.json").read_text())["made"]["method"]
    assert made["choices"][0]["keep"] == [3]


def test_inspect_says_what_is_wrong(workplace, tmp_path):
    settings = {
        "model": str(workplace / "model"), "scope": str(workplace / "scope"),
        "dictionary": str(workplace / "dictionary"), "output": tmp_path,
    }  # fmt: skip
    with pytest.raises(InvalidConfig, match="given: 'three'"):
        inspect(**settings, features="three")
    with pytest.raises(InvalidConfig, match="given: 999"):
        inspect(**settings, features="999")
    other = Choice(keep=(3,), dictionary="other").save(tmp_path / "choice.yaml")
    with pytest.raises(DictionaryMismatch, match="chosen in other"):
        inspect(**settings, choice=other)


def test_explain_prints_a_row_a_token_and_writes_all_of_it(workplace, tmp_path):
    dictionary = load_dictionary(workplace / "dictionary")
    patch = FeaturePatch(dictionary=dictionary, features=range(8), edit=Clamp(to=-3.0))
    patch.save(tmp_path / "patch", LM.load(str(workplace / "model")))
    common = ("--patch", tmp_path / "patch", "--model", workplace / "model", "--output", tmp_path / "why.json")
    out = shell("explain", "w30 w31", *common, "--plain", "--strength", 0.5)
    assert "feature patch at strength 0.5" in out
    found = json.loads((tmp_path / "why.json").read_text())
    assert [m["text"].strip() for m in found["moments"]] == ["w30", "w31"]
