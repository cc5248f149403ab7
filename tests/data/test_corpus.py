"""A corpus reads the same documents each time, from wherever they are, and says what it cannot read."""

from __future__ import annotations

import json

import pytest

from concept_unlearn import Corpus
from concept_unlearn.errors import EmptyData, InvalidData

TEXTS = ["one two", "three", "four five six"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in TEXTS))
    (tmp_path / "b.txt").write_text("a whole\n\ndocument")
    from datasets import Dataset

    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "c.parquet")
    return tmp_path


def test_each_kind_of_file_and_a_folder_of_them(files):
    assert list(Corpus.load(files / "a.jsonl")) == TEXTS
    assert list(Corpus.load(files / "b.txt")) == ["a whole\n\ndocument"]
    assert list(Corpus.load(files / "c.parquet")) == TEXTS
    assert list(Corpus.load(files)) == [*TEXTS, "a whole\n\ndocument", *TEXTS]
    assert list(Corpus.load([files / "b.txt", files / "a.jsonl"])) == ["a whole\n\ndocument", *TEXTS]


def test_it_can_be_read_again():
    corpus = Corpus.of(TEXTS)
    assert list(corpus) == list(corpus) == TEXTS


def test_the_fingerprint_changes_with_the_text_and_not_with_the_place(files, tmp_path_factory):
    first = Corpus.load(files / "a.jsonl").fingerprint
    moved = tmp_path_factory.mktemp("other") / "z.jsonl"
    moved.write_bytes((files / "a.jsonl").read_bytes())
    assert Corpus.load(moved).fingerprint == first
    moved.write_text(moved.read_text().replace("two", "too"))
    assert Corpus.load(moved).fingerprint != first
    assert Corpus.load(files / "a.jsonl", field="other").fingerprint != first
    assert Corpus.of(["ab", "c"]).fingerprint != Corpus.of(["a", "bc"]).fingerprint


def test_what_cannot_be_read_is_named(files):
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: no text in field 'body'; it has: text, other"):
        list(Corpus.load(files / "a.jsonl", field="body"))
    with pytest.raises(InvalidData, match=r"c\.parquet, row 0"):
        list(Corpus.load(files / "c.parquet", field="body"))
    with pytest.raises(InvalidData, match="known kinds"):
        Corpus.load(files / "d.csv") if (files / "d.csv").write_text("a") else None
    with pytest.raises(InvalidData, match=r"no file, folder or dataset"):
        Corpus.load(files / "nothing.jsonl")
    (files / "empty").mkdir()
    with pytest.raises(InvalidData, match="holds no text"):
        Corpus.load(files / "empty")


def test_a_corpus_without_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(EmptyData, match=r"a\.jsonl"):
        list(Corpus.load(tmp_path / "a.jsonl"))


def test_a_dataset_of_the_hub_may_have_a_dot_in_its_name():
    corpus = Corpus.load("nobody/text-v1.5")
    assert corpus.name == "nobody/text-v1.5"
    assert corpus.fingerprint != Corpus.load("nobody/text-v1.5", split="test").fingerprint
