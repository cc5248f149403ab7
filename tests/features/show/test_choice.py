"""A choice survives its file, and says what is wrong with one."""

from __future__ import annotations

import pytest

from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig
from concept_unlearn.features import Choice
from concept_unlearn.patches import FeaturePatch


def test_a_choice_survives_its_file(tmp_path):
    choice = Choice(keep=(3, 5), drop=(7,), pinned=(11,), dictionary="smollm2/blocks.7.hook_resid_post")
    assert Choice.load(choice.save(tmp_path / "deep" / "choice.yaml")) == choice


def test_the_file_of_the_page_is_read(tmp_path):
    (tmp_path / "choice.yaml").write_text('keep: [3, 5]\ndrop: []\npinned:\ndictionary: "a: b"\n')
    assert Choice.load(tmp_path / "choice.yaml") == Choice(keep=(3, 5), dictionary="a: b")


def test_pinned_features_come_first_and_dropped_ones_never():
    choice = Choice(keep=(3,), drop=(7, 1), pinned=(11, 12))
    assert choice.features == (11, 12, 3)
    assert choice.over([7, 3, 8, 1, 9], 5) == (11, 12, 3, 8, 9)
    assert choice.over([7, 8], 1) == (11, 12)
    assert Choice().over([2, 1], 2) == (2, 1)


def test_a_patch_is_made_of_a_choice(planted):
    dictionary = load_dictionary(planted.first)
    patch = FeaturePatch(dictionary=dictionary, features=Choice(keep=(5,), pinned=(3,)).of(dictionary))
    assert patch.slices[0].features == (3, 5)


@pytest.mark.parametrize(
    ("choice", "error", "match"),
    [
        (Choice(keep=(1,), dictionary="other"), DictionaryMismatch, "chosen in other, not in first"),
        (Choice(keep=(999,)), InvalidConfig, "given: 999"),
        (Choice(drop=(1,)), InvalidConfig, "no feature"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(planted, choice, error, match):
    dictionary = load_dictionary(planted.first)
    assert isinstance(dictionary, SAEDictionary)
    with pytest.raises(error, match=match):
        choice.of(dictionary)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("keep: [1, 2]\ndrop: [2]", "feature 2 is decided about more than once"),
        ("kep: [1]", "has no 'kep'; known: keep, drop, pinned, dictionary"),
        ("keep: [one]", "keep.0"),
        ("[1, 2]", "it holds list"),
        ("keep: [", "is not YAML"),
    ],
)
def test_a_file_that_is_no_choice_is_said_to_be_none(tmp_path, text, match):
    (tmp_path / "choice.yaml").write_text(text)
    with pytest.raises(InvalidConfig, match=match):
        Choice.load(tmp_path / "choice.yaml")
    with pytest.raises(InvalidConfig, match="no file of chosen features"):
        Choice.load(tmp_path / "none.yaml")
