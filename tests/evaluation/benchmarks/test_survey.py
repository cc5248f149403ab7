from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import words

from concept_unlearn.data.scope import PROBES, Scope
from concept_unlearn.errors import EmptyData, InvalidData
from concept_unlearn.evaluation.benchmark import Benchmark
from concept_unlearn.evaluation.benchmarks import Survey, overlaps
from concept_unlearn.lm import LM


def probes(start: int, n: int = 3, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": words(i, 7, 8), "answers": words(i, i + 1), "wordings": [words(8, i), words(9, i)], **fields}
        for i in range(start, start + n)
    ]


DOCUMENT = "one two three four five six seven eight nine ten eleven"
PARTS: dict[str, Any] = {
    "forget": [DOCUMENT, words(*range(30, 44))],
    "near": ["quite another text about something"],
    "retain": [words(*range(4, 18))],
    "in_easy": probes(10),
    "in_hard": probes(14),
    "out_near": probes(18),
    "out_far": probes(22, chat=True),
}


def scope(**parts: Any) -> Scope:
    return Scope.of("made", **{**PARTS, **parts})


def test_each_set_has_its_own_numbers_and_none_is_pooled(lm: LM):
    survey = Survey(scope())
    measured = survey.measure(survey.observe(lm))
    metrics = ("extraction_strength", "probability", "consistency")
    assert set(measured) == {f"{name}/{metric}" for name in PROBES for metric in metrics}
    assert {m.n for m in measured.values()} == {3}
    assert {line.metric for line in survey.lines} == set(measured)
    assert [m.name for m in survey.leaks] == ["in_easy/extraction_strength", "in_hard/extraction_strength"]
    assert survey.keeps.name == "out_near/extraction_strength"


def test_an_empty_set_is_said_and_never_scored(lm: LM):
    survey = Survey(scope(in_hard=[], out_near=[]))
    measured = survey.measure(survey.observe(lm))
    for name in ("in_hard", "out_near"):
        for metric in ("extraction_strength", "probability", "consistency"):
            found = measured[f"{name}/{metric}"]
            assert (found.value, found.n_total, found.notes["undefined"]) == (None, 0, "the set is empty")
    assert [m.name for m in survey.leaks] == ["in_easy/extraction_strength"]
    assert survey.keeps.name == "out_far/extraction_strength"
    with pytest.raises(EmptyData, match="no in_easy or in_hard probe"):
        Survey(scope(in_easy=[], in_hard=[]))


def test_without_other_wordings_nothing_is_said_of_consistency(lm: LM):
    survey = Survey(scope(in_easy=probes(10, wordings=[])))
    found = survey.measure(survey.observe(lm))["in_easy/consistency"]
    assert (found.value, found.n_total, found.notes["undefined"]) == (None, 3, "undefined for every example")


@pytest.mark.parametrize(
    ("parts", "part", "why"),
    [
        ({"out_near": probes(18, answers="W10 w11!")}, "out_near", "'W10 w11!' answers 'w18 w7 w8' and .* of in_easy"),
        ({"out_far": probes(22, answers=["new", words(15, 16)])}, "out_far", "'w15 w16' answers .* of in_hard"),
        ({"near": [f"{DOCUMENT.upper()}, so"]}, "near", "more than half of 'ONE TWO"),
        ({"retain": [f"{DOCUMENT} {words(*range(100, 140))}"]}, "retain", "more than half of 'one two"),
        ({"retain": ["two three four five six seven eight nine ten then"]}, "retain", "more than half of 'two three"),
    ],
)  # fmt: skip
def test_what_is_to_be_kept_and_forgotten_is_refused_or_dropped(parts: dict[str, Any], part: str, why: str):
    made = scope(**parts)
    with pytest.raises(InvalidData, match=rf"scope 'made', {part}: {why}.*overlap='drop' leaves them out"):
        Survey(made)
    if part != "retain":  # the only document to keep
        kept = Survey(made, overlap="drop").request
        assert not list(overlaps(kept))
        assert len(getattr(kept, part)) < len(getattr(made, part))


def test_half_of_the_eight_word_runs_may_be_shared():
    assert len(DOCUMENT.split()) - 7 == 4
    half = "one two three four five six seven eight nine and so"
    assert not list(overlaps(scope(near=[half])))
    more = "one two three four five six seven eight nine ten so"
    assert [o.part for o in overlaps(scope(near=[more]))] == ["near"]


def test_a_short_text_is_shared_only_if_all_of_it_is():
    with pytest.warns(UserWarning, match="also to be kept"):
        same = scope(forget=["To be."], near=["to be!"])
    assert [o.part for o in overlaps(same)] == ["near"]
    assert not list(overlaps(scope(forget=["To be."], near=["to be or not"])))
    replies = [{"prompt": f"Is it {what}?", "text": "Yes."} for what in ("so", "not")]
    assert not list(overlaps(scope(forget=replies[:1], near=replies[1:])))


def test_one_prompt_in_and_out_of_scope_is_refused_as_in_every_scope():
    with pytest.raises(InvalidData, match="is asked both in and out of scope"):
        scope(out_near=probes(10, answers="new"))


def test_batches_change_nothing(lm: LM):
    one, many = (Survey(scope(), batch_size=size) for size in (1, 7))
    a, b = one.measure(one.observe(lm)), many.measure(many.observe(lm))
    assert {n: m.value for n, m in a.items()} == {n: pytest.approx(m.value, abs=1e-5) for n, m in b.items()}


def test_limits_take_the_first_of_each_set():
    sets = Survey(scope(), n_items=2).sets
    assert {len(sets[name].examples) for name in PROBES} == {2}
    assert {len(sets[f"{name}_wordings"].examples) for name in PROBES} == {4}


HELD = [words(9, 41, 12, 33, 20, 8, 17, 40, 10, 25, 36), words(*range(43, 28, -1))]


def test_without_documents_held_out_membership_is_not_asked(lm: LM):
    assert not {"forget", "holdout"} & set(Survey(scope()).sets)


def test_membership_is_told_from_documents_held_out(lm: LM):
    """Of all pairs of a document to forget and one held out: how often the first has the lower loss."""
    survey = Survey(scope(), holdout=Scope.of("held", forget=HELD))
    view = survey.observe(lm)
    measured = survey.measure(view)
    assert {line.metric for line in survey.lines} == set(measured)
    losses = [[-group[0].mean_logprob for group in view[name].answers] for name in ("forget", "holdout")]
    pairs = [(m < o) + (m == o) / 2 for m in losses[0] for o in losses[1]]
    assert measured["forget/loss_auc"].value == pytest.approx(sum(pairs) / len(pairs))
    assert measured["forget/priv_leak"].value is None
    assert "retrained" in measured["forget/priv_leak"].notes["undefined"]
    beside = survey.measure(view.beside(retrained=view))
    auc = beside["forget/membership_auc"].value
    assert beside["forget/priv_leak"].value == (pytest.approx(0) if auc < 1 else None)


def test_documents_held_out_that_are_to_be_forgotten_are_refused():
    with pytest.raises(
        InvalidData, match=r"holdout: more than half of 'one two .* what was trained on is not held out"
    ):
        Survey(scope(), holdout=Scope.of("held", forget=[f"{DOCUMENT} twelve", *HELD]))


def test_it_is_its_spec_with_documents_held_out(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in HELD))
    survey = Survey("shakespeare", overlap="drop", holdout=str(path))
    spec = json.loads(json.dumps(survey.spec()))
    assert spec["holdout"] == str(path)
    assert [p.text for p in Benchmark.parse(spec).holdout.forget] == HELD


def test_it_is_its_spec():
    survey = Survey("shakespeare", overlap="drop", n_items=5)
    spec = json.loads(json.dumps(survey.spec()))
    assert spec["scope"] == "shakespeare"
    assert Benchmark.parse(spec) == survey
    assert Benchmark.parse(spec).digest == survey.digest


def test_of_a_built_in_concept_whose_answers_are_apart_nothing_is_dropped():
    whole = Survey("astronomy")
    assert whole.sets == Survey("astronomy", overlap="drop").sets
    assert whole.request == whole.scope
