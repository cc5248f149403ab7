"""Requests one after another: each on what the last one left, none read before its turn, stopped and gone on with."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import words
from sequence.scenes import FIRST, KEPT, SECOND, THIRD, topic
from workers import tiny_finetune

from concept_unlearn.data.examples import Passage
from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import EmptyData, InvalidConfig, UnknownName
from concept_unlearn.evaluation.benchmarks import ConceptBenchmark, MultipleChoice
from concept_unlearn.lm import LM
from concept_unlearn.methods import Method, Steer, Study
from concept_unlearn.objectives import GA, NPO, RetainKL
from concept_unlearn.patches import Stack, WeightPatch, load_patch
from concept_unlearn.run.config import CalibrationSpec
from concept_unlearn.sequence import SequenceReport, Sequential, total
from concept_unlearn.training import Loop

FORGET = tiny_finetune(objectives=(GA(), RetainKL()), max_steps=3)


@pytest.fixture
def topics(lm):
    return [topic(lm, name, pool) for name, pool in (("first", FIRST), ("second", SECOND), ("third", THIRD))]


class _Spy(Method):
    """Learns nothing, and tells what it was given."""

    kind = "spy"

    def fit(self, study: Study) -> WeightPatch:
        SEEN.append(study)
        return WeightPatch({})


SEEN: list[Study] = []


def logits(lm, patch, ids):
    with torch.no_grad(), patch.on(lm):
        return lm.logits(ids)


class TestEachRequest:
    @pytest.mark.parametrize("fixed", [False, True])
    def test_a_single_one_is_the_plain_method_to_the_last_bit(self, lm, topics, fixed, tmp_path):
        plain = FORGET(lm, topics[0].halves().tune)
        for folder in (None, tmp_path):
            one = Sequential(lm, FORGET, topics[:1], fixed_reference=fixed, folder=folder)
            assert one.patch().digest == plain.digest
        assert Sequential(lm, FORGET, topics[:1], folder=tmp_path).patch().digest == plain.digest

    @pytest.mark.parametrize(
        "method", [FORGET, Steer(sites=("resid_post.1",), edit={"kind": "shift", "by": -2})], ids=lambda m: m.kind
    )
    def test_starts_from_what_the_last_one_left(self, lm, topics, ids, method):
        found = Sequential(lm, method, topics[:2]).patch()
        first = method(lm, topics[0].halves().tune)
        with first.on(lm):
            second = method(lm, topics[1].halves().tune)
        assert isinstance(found, Stack)
        assert [p.digest for p in found.patches] == [first.digest, second.digest]
        assert torch.equal(logits(lm, found, ids), logits(lm, Stack((first, second)), ids))
        assert second.digest != method(lm, topics[1].halves().tune).digest

    def test_compares_with_the_last_one_or_with_the_untouched_model(self, lm, topics):
        method = tiny_finetune(objectives=(NPO(beta=1.0), RetainKL()), lr=1e-2)
        moving, fixed = (Sequential(lm, method, topics[:2], fixed_reference=f).patch().patches for f in (False, True))
        assert moving[0].digest == fixed[0].digest
        assert moving[1].digest != fixed[1].digest

    def test_keeps_nothing_that_was_to_be_forgotten_before(self, lm, topics):
        old = topics[0].forget
        again = [*(p.text for p in topics[1].retain), *(p.text for p in old)]
        SEEN.clear()
        second = topic(lm, "second", SECOND, retain=again, near=[old[0], words(*KEPT[:6])])
        Sequential(lm, _Spy(), [topics[0], second, topics[2]]).patch()
        assert SEEN[0].scope == topics[0].halves().tune
        kept = (*SEEN[1].scope.retain, *SEEN[1].scope.near)
        assert kept
        assert not {p.text for p in kept} & {p.text for p in old}
        assert SEEN[1].scope.forget == second.halves().tune.forget
        assert SEEN[2].scope == topics[2].halves().tune

    def test_must_keep_something(self, lm, topics):
        with pytest.raises(EmptyData, match="keeps nothing but what was to be forgotten before"):
            Sequential(lm, _Spy(), [topics[0], topic(lm, "second", SECOND, retain=topics[0].forget)]).patch()

    def test_is_not_read_before_its_turn(self, lm, topics, tmp_path, monkeypatch):
        """Neither while those before it are served nor when they are asked about; the folder is not even there."""
        told, load = [], Scope._load

        @contextmanager
        def track(title, total):
            told.append(title)
            yield None

        monkeypatch.setattr(Scope, "_load", lambda source: told.append(f"read {source}") or load(source))
        later = tmp_path / "later"
        found = Sequential(lm, FORGET, [topics[0], topics[1], later], tracker=track)
        with pytest.raises(UnknownName, match="later"):
            found.report()
        assert told == [
            "forget first", "ask about first after nothing", "ask about first after first",
            "forget second", "ask about second after nothing", "ask about first after second",
            "ask about second after second", f"read {later}",
        ]  # fmt: skip


class TestTheModel:
    def test_is_what_it_was_afterwards(self, lm, topics, ids):
        before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
        places = {name: p.data_ptr() for name, p in lm.model.named_parameters()}
        Sequential(lm, FORGET, topics, fixed_reference=True).report()
        assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
        assert places == {name: p.data_ptr() for name, p in lm.model.named_parameters()}

    def test_forgets_what_was_asked_first_too(self, lm, topics):
        report = Sequential(lm, tiny_finetune(lr=1e-2, epochs=4), topics[:2]).report()
        left = [[m and m.value for m in (row.left(t.name, report) for t in topics[:2])] for row in report.rows]
        assert left[0][1] is None
        assert max(left[0][0], *left[1]) < 1.0
        assert all(report.untouched.left(t.name, report).value == 1 for t in topics[:2])


class TestPatchesJoined:
    def test_changes_of_weights_add_up_to_what_the_stack_does(self, lm, topics, ids):
        stacked, summed = (Sequential(lm, FORGET, topics, **how).patch() for how in ({}, {"join": total}))
        assert isinstance(summed, WeightPatch)
        want = logits(lm, stacked, ids)
        torch.testing.assert_close(logits(lm, total(stacked.patches), ids), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(lm, summed, ids), want, rtol=0, atol=0.05)  # Adam makes more of rounding

    def test_others_do_not_add_up(self, lm, topics):
        with pytest.raises(InvalidConfig, match="leaves a feature patch: stack them"):
            Sequential(lm, Steer(sites=("resid_post.1",)), topics[:2], join=total).patch()

    def test_any_function_may_join_them(self, lm, topics):
        seen = []
        Sequential(lm, FORGET, topics, join=lambda patches: seen.append(len(patches)) or patches[-1]).patch()
        assert seen == [1, 2, 3]


class TestStops:
    def test_stopped_anywhere_it_ends_the_same_and_what_is_finished_is_not_done_again(
        self, lm, topics, tmp_path, monkeypatch
    ):
        whole = Sequential(lm, FORGET, topics[:2], folder=tmp_path / "whole").report()
        calls, limit, taken, take, score, write = 0, 0, [], Loop._take, LM.score, LM.write

        def counted(original):
            def call(*arguments, **settings):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise KeyboardInterrupt
                return original(*arguments, **settings)

            return call

        monkeypatch.setattr(LM, "score", counted(score))
        monkeypatch.setattr(LM, "write", counted(write))
        monkeypatch.setattr(Loop, "_take", lambda loop: taken.append(loop.step) or counted(take)(loop))
        for _ in range(40):
            calls, limit = 0, 5
            try:
                found = Sequential(lm, FORGET, topics[:2], folder=tmp_path / "stopped").report()
                break
            except KeyboardInterrupt:
                continue
        assert found == whole
        patches = [load_patch(tmp_path / name / "patch", lm) for name in ("whole", "stopped")]
        assert patches[0].digest == patches[1].digest
        assert not list((tmp_path / "stopped").glob("*/work-*"))
        calls, limit = 0, 0
        assert Sequential(lm, FORGET, topics[:2], folder=tmp_path / "stopped").report() == whole

    def test_another_second_request_leaves_the_first_as_it_is(self, lm, topics, tmp_path, monkeypatch):
        Sequential(lm, FORGET, topics[:2], folder=tmp_path).report()
        served, fit = [], type(FORGET).fit
        monkeypatch.setattr(
            type(FORGET), "fit", lambda method, study: served.append(study.scope.name) or fit(method, study)
        )
        report = Sequential(lm, FORGET, [topics[0], topics[2]], folder=tmp_path).report()
        assert served == ["third"]
        assert list(report.told) == ["first", "third"]

    def test_a_patch_that_was_altered_is_made_again(self, lm, topics, tmp_path):
        digest = Sequential(lm, FORGET, topics[:1], folder=tmp_path).patch().digest
        WeightPatch({}).save(tmp_path / "1-first" / "patch", lm)
        assert Sequential(lm, FORGET, topics[:1], folder=tmp_path).patch().digest == digest


class TestCalibration:
    def test_every_patch_is_set_to_what_keeps_enough_of_what_there_was(self, lm, topics, tmp_path):
        method = tiny_finetune(lr=2e-2)
        spec = CalibrationSpec(keep=0.6, max_perplexity=1.5, max_gibberish=1.0, grid=4, tolerance=0.5)
        found = Sequential(lm, method, topics[:2], calibration=spec, folder=tmp_path)
        patches = found.patch().patches
        assert [row.strength for row in found.report().rows] == [p.strength for p in patches]
        assert all(0 < p.strength < 1 for p in patches)
        first = method(lm, topics[0].halves().tune)
        assert patches[0].digest == first.at(patches[0].strength).digest


class TestRequests:
    def test_a_benchmark_is_one_and_is_learned_from_whole(self, lm, topics):
        SEEN.clear()
        report = Sequential(lm, _Spy(), [ConceptBenchmark(topics[0], max_passages=2), topics[1]]).report()
        assert SEEN[0].scope == topics[0]
        assert list(report.told) == ["first", "second"]

    def test_a_benchmark_without_a_scope_is_none(self, lm):
        with pytest.raises(InvalidConfig, match="the multiple_choice benchmark holds nothing to forget"):
            Sequential(lm, _Spy(), [MultipleChoice(forget="cais/wmdp/wmdp-bio")]).patch()

    def test_those_of_one_name_are_numbered(self, lm, topics):
        assert [r.name for r in Sequential(lm, _Spy(), [*topics, topics[0]]).requests][-1] == "first 2"

    def test_there_is_one_at_least(self, lm):
        with pytest.raises(InvalidConfig, match="at least one request"):
            Sequential(lm, _Spy(), [])

    def test_passages_are_compared_by_what_they_say(self, topics):
        scope = topics[0]
        assert scope.without([]) is scope
        assert scope.without([Passage(text="W9 nothing")]) is scope
        text = scope.retain[0].text
        assert Passage(text=text) not in scope.without([Passage(text=text.upper())]).retain


def test_what_is_saved_is_loaded_again(lm, topics, tmp_path):
    report = Sequential(lm, FORGET, topics[:2], folder=tmp_path).report()
    assert SequenceReport.load(tmp_path) == report
    assert (tmp_path / "sequence.md").read_text() == report.markdown()
    assert (tmp_path / "sequence.svg").read_text() == report.plot()
