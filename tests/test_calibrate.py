"""The search for a strength, on curves whose answer is known, and on a live model."""

from __future__ import annotations

import pytest
from conftest import make_sae, words

from concept_unlearn.calibrate import RetainedUtility, calibrate, find_strength
from concept_unlearn.data.scope import Scope
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.patches import FeaturePatch


def test_a_monotone_curve_is_found_to_the_tolerance():
    found = find_strength(lambda a: 1 - a * a, target=0.9)
    assert found.strength == pytest.approx(0.1**0.5, abs=0.005)
    assert found.achieved >= 0.9


def test_an_isolated_feasible_region_is_not_missed():
    """Bisection over [0, 1] would stop at 0.2."""

    def curve(a):
        return 1 - a / 2 if a < 0.3 else 0.8 if a < 0.6 else 0.95 if a < 0.7 else 0.2

    found = find_strength(curve, target=0.9)
    assert found.strength == pytest.approx(0.7, abs=0.005)
    assert curve(found.strength) >= 0.9
    tried = dict(found.curve)
    above = min(s for s in tried if s > found.strength)
    assert tried[above] < 0.9


def test_a_patch_that_keeps_all_stays_at_full_strength_after_one_look():
    found = find_strength(lambda a: 2.0)
    assert found.strength == 1.0
    assert len(found.curve) == 1


def test_a_patch_that_keeps_nothing_is_switched_off():
    found = find_strength(lambda a: 1.0 if a == 0 else 0.0, tolerance=0.01)
    assert found.strength == 0.0
    assert found.achieved == 1.0


def test_a_grid_needs_two_points():
    with pytest.raises(InvalidConfig, match="at least 2"):
        find_strength(lambda a: 1.0, grid=1)


@pytest.fixture
def scope(lm):
    """Probes that the tiny model answers, because the answers are what it says."""
    prompts = [words(i, i + 1, i + 2) for i in range(7, 27)]
    said = lm.generate(prompts, max_new_tokens=2, chat=False)
    probes = [{"prompt": p, "answers": s} for p, s in zip(prompts, said, strict=True) if s.strip()]
    retain = [words(*range(i, i + 8)) for i in range(7, 39)]
    return Scope.of("tiny", forget=[words(40, 41, 42)], retain=retain, out_near=probes, out_far=[])


@pytest.fixture
def patch():
    return FeaturePatch(dictionary=make_sae("standard"), features=[1, 3], edit=DenseClamp(to=-0.5))


def test_utility_is_one_over_what_was_asked_when_off(lm, scope, patch):
    utility = RetainedUtility(lm, patch, scope, keep=0.9, max_perplexity=1.2)
    assert utility(0.0) == pytest.approx(min(1 / 0.9, 1.2))
    assert utility(1.0) < 1


def test_a_calibrated_patch_keeps_what_was_asked_and_knows_its_model(lm, scope, patch):
    found = calibrate(lm, patch, scope, keep=0.9, max_perplexity=1.5, grid=6, tolerance=0.02)
    assert 0 < found.strength < 1
    utility = RetainedUtility(lm, patch, scope, keep=0.9, max_perplexity=1.5)
    assert utility(found.strength) >= 1
    assert found.origin is not None
    assert found.origin.fingerprint == lm.fingerprint


def test_a_patch_that_cannot_keep_it_is_off_and_warned_of(lm, scope, patch):
    with pytest.warns(UserWarning, match="no strength"):
        found = calibrate(lm, patch, scope, keep=1.0, max_perplexity=1.0, grid=2, tolerance=0.9)
    assert found.strength == 0


@pytest.mark.parametrize("settings", [{"keep": 0.0}, {"keep": 1.1}, {"max_perplexity": 0.9}])
def test_targets_out_of_range_are_refused(lm, scope, patch, settings):
    with pytest.raises(InvalidConfig, match="given: "):
        RetainedUtility(lm, patch, scope, **settings)


def test_nothing_to_keep_is_said(lm, patch):
    scope = Scope.of("tiny", forget=[words(40, 41)], retain=[words(7, 8, 9)], out_far=[])
    with pytest.raises(EmptyData, match="no out_near or out_far probe"):
        RetainedUtility(lm, patch, scope)
    wrong = Scope.of(
        "t", forget=[words(40)], retain=[words(7, 8)], out_near=[{"prompt": words(7), "answers": "never"}], out_far=[]
    )
    with pytest.raises(EmptyData, match="answers no retained probe"):
        RetainedUtility(lm, patch, wrong)
