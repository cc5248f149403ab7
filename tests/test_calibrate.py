"""The search for a strength, on curves whose answer is known, and on a live model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_sae, words

from concept_unlearn.calibrate import RetainedMetric, RetainedUtility, calibrate, find_strength
from concept_unlearn.data.examples import Probe
from concept_unlearn.data.scope import Scope
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import EmptyData, InvalidConfig, UnknownName
from concept_unlearn.evaluation.benchmarks import ConceptBenchmark
from concept_unlearn.evaluation.metrics import AnswerLogprob, GeneratedAccuracy
from concept_unlearn.patches import FeaturePatch, WeightPatch
from concept_unlearn.weights import Dense


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


def test_a_tolerance_that_no_bisection_reaches_is_refused():
    with pytest.raises(InvalidConfig, match="tolerance"):
        find_strength(lambda a: 1 - a, tolerance=0)


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
    utility = RetainedUtility(lm, scope, keep=0.9, max_perplexity=1.2)
    assert utility(patch.at(0)) == pytest.approx(min(1 / 0.9, 1.2))
    assert utility(patch) < 1


def test_a_calibrated_patch_keeps_what_was_asked_and_knows_its_model(lm, scope, patch):
    found = calibrate(lm, patch, scope, keep=0.9, max_perplexity=1.5, grid=6, tolerance=0.02)
    assert 0 < found.strength < 1
    assert RetainedUtility(lm, scope, keep=0.9, max_perplexity=1.5)(found) >= 1
    assert found.origin is not None
    assert found.origin.fingerprint == lm.fingerprint


def test_replies_in_scope_must_stay_fluent(lm, scope, patch, monkeypatch):
    """What is gibberish is another's test: here every reply that the patch changed counts as such."""
    prompts = [words(i, i + 1) for i in range(30, 50)]
    asked = replace(scope, in_easy=[Probe(prompt=p, answers=("never",)) for p in prompts])

    def written():
        ids = [lm.encode(p, chat=False) for p in prompts]
        return [tuple(reply) for reply in lm.generate_ids(ids, max_new_tokens=10)]

    before = written()
    monkeypatch.setattr(
        "concept_unlearn.evaluation.metrics.answers.is_gibberish", lambda ids, _: tuple(ids) not in set(before)
    )
    with patch.on(lm):
        changed = sum(reply not in set(before) for reply in written()) / 20
    assert 0 < changed < 1
    lenient = RetainedUtility(lm, asked, keep=0.01, max_perplexity=1e9, max_gibberish=0.5)
    assert lenient(patch) == pytest.approx((1 - changed) / 0.5)
    assert RetainedUtility(lm, asked, keep=0.01, max_perplexity=1e9, max_gibberish=0)(patch) < 1


def test_one_observation_of_the_base_serves_every_patch(lm, scope, patch):
    shared = RetainedUtility(lm, scope, keep=0.9, max_perplexity=1.2)
    for strength in (1.0, 0.1):
        alone = RetainedUtility(lm, scope, keep=0.9, max_perplexity=1.2)
        assert shared(patch.at(strength)) == alone(patch.at(strength))


def test_a_patch_that_cannot_keep_it_is_off_and_warned_of(lm, scope, patch):
    with pytest.warns(UserWarning, match="the best reachable is"):
        found = calibrate(lm, patch, scope, keep=1.0, max_perplexity=1.0, grid=2, tolerance=0.9)
    assert found.strength == 0


@pytest.mark.parametrize("settings", [{"keep": 0.0}, {"keep": 1.1}, {"max_perplexity": 0.9}, {"max_gibberish": -0.1}])
def test_targets_out_of_range_are_refused(lm, scope, settings):
    with pytest.raises(InvalidConfig, match="given: "):
        RetainedUtility(lm, scope, **settings)


def test_nothing_to_keep_is_said(lm):
    scope = Scope.of("tiny", forget=[words(40, 41)], retain=[words(7, 8, 9)], out_far=[])
    with pytest.raises(EmptyData, match="no out_near or out_far probe"):
        RetainedUtility(lm, scope)
    wrong = Scope.of(
        "t", forget=[words(40)], retain=[words(7, 8)], out_near=[{"prompt": words(7), "answers": "never"}], out_far=[]
    )
    with pytest.raises(EmptyData, match="answers no retained probe correctly, of 1 in out_near of scope 't'"):
        RetainedUtility(lm, wrong)


class TestOnABenchmark:
    @pytest.fixture
    def benchmark(self, scope):
        return ConceptBenchmark(replace(scope, in_easy=scope.out_near[:2], out_near=scope.out_near[2:]))

    @pytest.fixture
    def weights(self, lm):
        name = "model.layers.1.mlp.down_proj.weight"
        shape = dict(lm.model.named_parameters())[name].shape
        return WeightPatch({name: Dense(torch.randn(shape, generator=torch.Generator().manual_seed(1)))})

    @pytest.mark.parametrize("kind", ["patch", "weights"])
    def test_any_patch_is_set_to_the_most_that_keeps_the_metric(self, lm, benchmark, kind, request):
        patch = request.getfixturevalue(kind)
        found = calibrate(lm, patch, benchmark, keep=0.8, grid=6, tolerance=0.02)
        utility = RetainedMetric(lm, benchmark, keep=0.8)
        assert utility.metric == benchmark.keeps
        assert 0 < found.strength < 1
        assert utility(found) >= 1
        assert utility(patch) < 1
        assert utility(patch.at(0)) == pytest.approx(1 / 0.8)

    def test_the_metric_is_chosen_by_name_or_brought(self, lm, benchmark, patch):
        named = RetainedMetric(lm, benchmark, metric="out_near/ranked_accuracy")
        brought = RetainedMetric(lm, benchmark, metric=GeneratedAccuracy(on="in_easy"))
        assert named.metric.name == "out_near/ranked_accuracy"
        assert brought(patch.at(0)) == pytest.approx(1 / 0.95)
        with pytest.raises(UnknownName, match=r"known: .*generated_accuracy"):
            RetainedMetric(lm, benchmark, metric="out_near/rouge")

    def test_a_target_beyond_the_untouched_model_says_what_can_be_reached(self, lm, benchmark):
        with pytest.raises(InvalidConfig, match=r"the best reachable is 1\b"):
            RetainedMetric(lm, benchmark, target=1.5)
        with pytest.raises(EmptyData, match="nothing to keep"):
            RetainedMetric(lm, benchmark, metric=AnswerLogprob(on="out_near"))

    def test_what_rises_as_less_is_kept_is_refused(self, lm, benchmark):
        with pytest.raises(InvalidConfig, match="higher where less is kept"):
            RetainedMetric(lm, benchmark, metric="general/perplexity")

    def test_a_metric_belongs_to_a_benchmark(self, lm, scope, patch):
        with pytest.raises(InvalidConfig, match="goes with a benchmark"):
            calibrate(lm, patch, scope, metric="out_near/ranked_accuracy")
