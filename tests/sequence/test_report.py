"""What a sequence tells: a share of what was kept, of questions that nobody was asked to forget, and a table."""

from __future__ import annotations

import re

import pytest
from sequence.scenes import FIRST, KEPT, SECOND, topic

from concept_unlearn.evaluation.measured import Measured, mean_of
from concept_unlearn.run.config import BenchmarkSpec
from concept_unlearn.sequence.report import After, SequenceReport, Told, gibberish, kept
from concept_unlearn.sequence.request import named

KEEPS, LEAKS = "out_near/generated_accuracy", "in_easy/generated_accuracy"


def requests_of(*scopes):
    return named(scopes, BenchmarkSpec(max_passages=2))


def results(requests, value):
    """Of each request a value an example: ``value(set, example)``."""
    found = {}
    for request in requests:
        sets = request.benchmark.sets
        means = {
            f"{name}/generated_accuracy": mean_of([value(name, e) for e in sets[name].examples])
            for name in ("in_easy", "out_near")
        }
        found[request.name] = means | {"in_scope/gibberish": mean_of([0.0, 1.0, float(request.name == "second")])}
    return found


@pytest.fixture
def pair(lm):
    return requests_of(topic(lm, "first", FIRST), topic(lm, "second", SECOND))


def test_kept_is_a_share_of_what_the_untouched_model_has_on_the_same_questions(pair):
    n = len(pair[0].benchmark.sets["out_near"].examples)
    lost = {e.key for e in pair[0].benchmark.sets["out_near"].examples[: n // 2]}
    before = results(pair, lambda *_: 0.8)
    after = results(pair, lambda _, e: 0.4 if e.key in lost else 0.8)
    found = kept(pair, after, before)
    assert found.n == n  # both keep the same questions, and each counts once
    assert found.value == pytest.approx(1 - 0.5 * (n // 2) / n)
    assert found.low < found.value < found.high
    assert kept(pair, before, before).value == 1


def test_what_another_request_is_about_is_not_to_be_kept(lm):
    first = topic(lm, "first", FIRST)
    second = topic(lm, "second", SECOND, out_near=[*first.in_easy, *first.out_near])
    requests = requests_of(first, second)
    forgotten = {p.key for p in first.in_easy}
    after = results(requests, lambda _, e: float(e.key not in forgotten))
    before = results(requests, lambda *_: 1.0)
    assert kept(requests, after, before).value == 1
    assert kept(requests[1:], after, before).value < 1


def test_without_a_mean_over_questions_the_least_share_counts(pair):
    before = {r.name: {KEEPS: Measured(value=0.8)} for r in pair}
    after = {"first": {KEEPS: Measured(value=0.6)}, "second": {KEEPS: Measured(value=0.4)}}
    assert kept(pair, after, before).value == pytest.approx(0.5)
    nothing = {r.name: {KEEPS: Measured(value=None)} for r in pair}
    assert kept(pair, nothing, before).value is None


def test_gibberish_is_of_all_replies_so_far(pair):
    assert gibberish(pair, results(pair, lambda *_: 0.0)).value == pytest.approx(0.5)
    assert gibberish(pair[:1], results(pair, lambda *_: 0.0)).value == pytest.approx(1 / 3)


@pytest.fixture
def report(pair):
    def after(name, n, value):
        asked = {r: m for r, m in results(pair, lambda *_: value).items() if r in [p.name for p in pair[:n]]}
        return After(request=name, asked=asked, kept=mean_of([value, 1.0]), gibberish=mean_of([0.0]))

    told = {r.name: Told(metric=LEAKS, label="answers right", kind="percent") for r in pair}
    rows = (after("first", 1, 0.25), after("second", 2, 0.125))
    return SequenceReport(
        model="tiny", method={"kind": "finetune"}, told=told, untouched=after("nothing", 2, 1.0), rows=rows
    )


def test_the_table_has_a_row_a_request_and_a_column_for_what_is_left_of_each(report):
    head, nothing, first, second = report.cells()
    assert head == ["after", "first left", "second left", "kept", "gibberish"]
    assert [cell.split(" ")[0] for cell in nothing] == ["nothing", "100%", "100%", "100%", "0%"]
    assert [cell.split(" ")[0] for cell in first] == ["first", "25%", "", "62%", "0%"]
    assert [cell.split(" ")[0] for cell in second] == ["second", "12%", "12%", "56%", "0%"]
    lines = report.markdown().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "training compares" not in lines[6]
    fixed = report.model_copy(update={"fixed_reference": True})
    assert "training compares with the untouched model" in fixed.markdown()
    assert "answers right (first, second)" in lines[6]


def test_the_plot_names_every_request_and_what_is_kept(report):
    svg = report.plot()
    for name in ("first, second", "kept"):  # both requests end at the same place
        assert f">{name}<" in svg
    assert len(re.findall("<title>", svg)) == 3 + 3 + 2  # untouched; after each request; of the second one less


def test_the_scene_keeps_what_it_says(pair):
    assert len(KEPT) == 16
    assert pair[0].benchmark.keeps.name == KEEPS
