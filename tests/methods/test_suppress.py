"""Suppress finds what was planted, edits it wherever a dictionary reads, and measures no more than it must."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, PLANTED

from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.edits import Clamp, Mean, Refuse, Zero
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.features import Choice, Score, measure
from concept_unlearn.lm import Site
from concept_unlearn.methods import Method, Steer, Study, Suppress

FIRST, SECOND = Site("resid_pre", 0), Site("resid_post", 1)


@pytest.fixture
def passes(planted):
    """One entry for each forward pass of the planted model."""
    seen = []
    handle = planted.lm.model.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


@pytest.mark.parametrize("score", sorted(Score.members))
def test_every_score_picks_the_planted_features(planted, score):
    n = 1 if score == "attribution" else 2  # to first order the other one helps no answer
    patch = Suppress(dictionaries=(planted.first,), score=score, n=n)(planted.lm, planted.scope)
    (chosen,) = patch.slices
    assert len(chosen.features) == n
    assert set(chosen.features) <= set(PLANTED)


def test_what_was_chosen_by_hand_comes_before_the_score_and_what_was_dropped_never(planted):
    name = load_dictionary(planted.first).name
    by_hand = Choice(pinned=(7,), drop=PLANTED[:1], dictionary=name)
    settings = {"dictionaries": (planted.first,), "score": "mean_difference", "choices": (by_hand,)}
    (chosen,) = Suppress(n=2, **settings)(planted.lm, planted.scope).slices
    assert chosen.features == (7, PLANTED[1])
    (alone,) = Suppress(n=1, **settings)(planted.lm, planted.scope).slices
    assert alone.features == (7,)
    assert Method.parse(Suppress(n=2, **settings).spec()).choices == (by_hand,)


@pytest.mark.parametrize(
    ("choice", "says"),
    [({"dictionary": "other"}, "a choice is of other"), ({}, "names its dictionary where there are")],
)
def test_a_choice_of_nothing_that_is_edited_is_refused(planted, choice, says):
    method = Suppress(dictionaries=(planted.first, planted.second), choices=(Choice(keep=(1,), **choice),))
    with pytest.raises(InvalidConfig, match=says):
        method(planted.lm, planted.scope)


def test_the_matched_control_picks_others_that_fire_as_often(planted):
    patch = Suppress(dictionaries=(planted.first,), n=2, matched_control=True)(planted.lm, planted.scope)
    control = list(patch.slices[0].features)
    stats = measure(planted.lm, load_dictionary(planted.first), planted.scope)
    assert not set(control) & set(PLANTED)
    assert (stats.forget.rate[control] - stats.forget.rate[list(PLANTED)]).abs().max() < 0.1
    assert (stats.forget.rate[control] <= 2 * stats.retain.rate[control]).all()
    assert (stats.retain.rate[list(PLANTED)] == 0).all()


@pytest.mark.parametrize("order", [1, -1])
def test_several_dictionaries_make_one_patch_that_edits_every_site(planted, order):
    names = (planted.first, planted.second)[::order]
    patch = Suppress(dictionaries=names, score="mean_difference", n=2, edit=Zero())(planted.lm, planted.scope)
    assert patch.sites == (FIRST, SECOND)
    ids = torch.tensor([planted.lm.encode(p.text, chat=False) for p in planted.scope.forget])
    with torch.no_grad(), planted.lm.read(FIRST, SECOND) as seen:
        planted.lm.logits(ids)
        before = [s.encode(seen[s.site]).acts.amax() for s in patch.slices]
        with patch.on(planted.lm), planted.lm.read(FIRST, SECOND) as edited:
            planted.lm.logits(ids)
    for chosen, fired in zip(patch.slices, before, strict=True):
        assert fired > 1
        assert chosen.encode(edited[chosen.site]).acts.amax() < 1e-5


def test_the_refusal_feature_is_edited_beside_the_chosen_ones(planted):
    method = Suppress(dictionaries=(planted.first,), n=2, edit=Refuse(to=3.0), refusal_features=(20,))
    assert method(planted.lm, planted.scope).slices[0].features[-1] == 20


@pytest.mark.parametrize("given", [None, (), (1, 2)])
def test_refuse_needs_one_refusal_feature_a_dictionary(planted, given):
    method = Suppress(dictionaries=(planted.first,), n=2, edit=Refuse(), refusal_features=given)
    with pytest.raises(InvalidConfig, match="needs refusal_features, one for each dictionary"):
        method(planted.lm, planted.scope)


def test_the_mean_edit_learns_what_retain_text_does(planted):
    (name,) = names = (planted.first,)
    patch = Suppress(dictionaries=names, score="mean_difference", n=4, edit=Mean())(planted.lm, planted.scope)
    means = measure(planted.lm, load_dictionary(name), planted.scope).retain.mean
    assert patch.edit.values == pytest.approx(means[list(patch.slices[0].features)].tolist())
    with pytest.raises(InvalidConfig, match="values of its own"):
        Suppress(dictionaries=(planted.first, planted.second), score="mean_difference", edit=Mean())(
            planted.lm, planted.scope
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 2 * D_MODEL + 1}, "has 32 features; asked for 33"),
        ({"n": 5}, "only 2 features .* pass selectivity; asked for 5: ask for fewer, or loosen min_ratio"),
        ({"n": 30, "matched_control": True, "score": "mean_difference"}, "fewer than 30 unselective features to match"),
    ],
)  # fmt: skip
def test_more_features_than_there_are_is_an_error(planted, settings, says):
    method = Method.parse({"kind": "suppress", "dictionaries": [planted.first], **settings})
    with pytest.raises(InvalidConfig, match=says):
        method(planted.lm, planted.scope)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "suppress", "dictionaries": []},
        {"kind": "steer", "sites": []},
        {"kind": "suppress", "dictionaries": ["a"], "n": 0},
    ],
)
def test_a_method_needs_something_to_work_on(spec):
    with pytest.raises(InvalidConfig, match=f"{spec['kind']}: (dictionaries|sites|n)"):
        Method.parse(spec)


class TestStudy:
    def methods(self, planted):
        first, second = planted.first, planted.second
        return [
            Suppress(dictionaries=(first,), n=2),
            Suppress(dictionaries=(first,), n=1, score="fisher", edit=Clamp(to=-9.0)),
            Suppress(dictionaries=(second, first), n=2, score="mean_difference"),
            Steer(sites=(FIRST,)),
            Steer(sites=(Site("resid_post", 0), SECOND), direction="leace"),
        ]

    def test_measures_once_for_several_methods(self, planted, passes):
        study, methods = Study(planted.lm, planted.scope), self.methods(planted)
        study.measure({d for m in methods for d in m.reads[0]}, {s for m in methods for s in m.reads[1]})
        assert len(passes) == 2  # forget, retain
        for method in methods:
            method.fit(study)
        assert len(passes) == 2

    def test_measures_what_nobody_announced_when_it_is_needed(self, planted, passes):
        study = Study(planted.lm, planted.scope)
        n_passes = []
        for method in self.methods(planted):
            method.fit(study)
            n_passes.append(len(passes))
        assert n_passes == [2, 2, 4, 4, 6]

    def test_gives_each_method_what_it_gets_alone(self, planted):
        study = Study(planted.lm, planted.scope)
        for method in self.methods(planted):
            shared, alone = method.fit(study), method(planted.lm, planted.scope)
            assert shared.spec() == alone.spec()
            for name, tensor in alone.tensors().items():
                torch.testing.assert_close(shared.tensors()[name], tensor)

    def test_fits_a_gate_once_for_all_who_use_it(self, planted, passes):
        study = Study(planted.lm, planted.scope)
        one = Suppress(dictionaries=(planted.first,), n=2, gate="probe").fit(study)
        n_passes = len(passes)
        other = Steer(sites=(FIRST,), gate="probe").fit(study)
        assert len(passes) == n_passes
        assert one.gate == other.gate
        assert one.gate.above is not None

    def test_tells_its_progress_of_every_passage(self, planted):
        steps, scope = [], planted.scope
        Suppress(dictionaries=(planted.first,), n=2)(planted.lm, scope, progress=steps.append)
        assert sum(steps) == len(scope.forget) + len(scope.near) + len(scope.retain)
