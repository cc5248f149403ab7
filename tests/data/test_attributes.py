"""What is known about a passage stays with it, from a file to a part of what is to be forgotten."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concept_unlearn.data.examples import Passage, to_passage, write_jsonl
from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import InvalidData

TEXTS = st.text(min_size=1, max_size=8)


@given(st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_they_come_back_from_a_file_whatever_they_are(attributes):
    passage = Passage(text="a", attributes=attributes)
    assert dict(passage.attributes) == attributes
    assert to_passage(json.loads(passage.model_dump_json())) == passage
    assert hash(to_passage(passage.model_dump())) == hash(passage)


def test_a_scope_keeps_them(tmp_path):
    lines = [
        {"text": "a", "attributes": {"author": "Kafka", "year": 1915}},
        {"question": "b", "answer": "c", "attributes": {"author": None, "year": 1925}},
        {"text": "d"},
    ]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scope = Scope.load(tmp_path)
    assert [p.attribute("author") for p in scope.forget] == ["Kafka", None, None]
    assert [p.attribute("year") for p in scope.forget] == ["1915", "1925", None]
    halves = [p for half in scope.halves() for p in half.forget]
    assert set(halves) == set(scope.forget)
    write_jsonl(tmp_path / "again.jsonl", scope.forget)
    assert Scope.load(tmp_path / "again.jsonl").forget == scope.forget


def test_their_order_is_no_difference():
    a, b = (Passage(text="a", attributes=d) for d in ({"x": "1", "y": "2"}, {"y": "2", "x": "1"}))
    assert a == b
    assert hash(a) == hash(b)


def test_a_passage_without_any_is_written_as_it_always_was():
    assert Passage(text="a").model_dump() == {"text": "a", "prompt": None, "alternates": ()}
    assert to_passage({"text": "a", "attributes": None}) == Passage(text="a")


@pytest.mark.parametrize("given", [{"author": ["Kafka"]}, {"author": {"name": "Kafka"}}, "Kafka"])
def test_what_is_no_text_or_number_is_refused(given):
    with pytest.raises(InvalidData, match="attributes"):
        to_passage({"text": "a", "attributes": given})
