"""Forget quality, the gap to the retrained model, improvement drop and robustness."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from evaluation.metrics.planted import scored, tokens, view

from concept_unlearn.evaluation.measured import Measured, mean_of, undefined
from concept_unlearn.evaluation.metrics import (
    ForgetQuality,
    normalised_improvement_drop,
    retrain_gap,
    robustness,
)


def ratios(*logs: float | None):
    """A view of probes with these log truth ratios."""
    return view(*[scored(tokens(0.0)) if r is None else scored(tokens(800.0), tokens(800.0 - r)) for r in logs])


def quality(ours, theirs) -> Measured:
    return ForgetQuality()(replace(ratios(*ours), retrained=ratios(*theirs)))


@pytest.mark.parametrize("n", [1, 5, 40, 400])
def test_a_model_against_itself_has_quality_1(n):
    generator = random.Random(n)
    logs = [generator.gauss(0, 1) for _ in range(n)]
    found = quality(logs, logs)
    assert found.value == 1
    assert found.notes["statistic"] == 0
    assert found.notes["log10_p"] == 0


@pytest.mark.parametrize(("n", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_the_floor_at_full_separation(n, floor):
    found = quality([i / n for i in range(n)], [2 + i / n for i in range(n)])
    assert found.value == pytest.approx(floor, rel=5e-3)
    assert found.value == pytest.approx(2 / math.comb(2 * n, n))
    assert found.notes["log10_p"] == pytest.approx(math.log10(floor), abs=5e-3)
    assert (found.notes["statistic"], found.n, found.notes["n_retrained"]) == (1, n, n)


@pytest.mark.parametrize("seed", range(5))
def test_the_statistic_by_its_definition_whatever_the_order_and_the_side_of_the_ratio(seed):
    generator = random.Random(seed)
    ours, theirs = ([round(generator.gauss(shift, 1), 1) for _ in range(n)] for shift, n in ((0, 17), (0.7, 23)))
    found = quality(ours, theirs)
    gaps = [abs(np.mean([x <= at for x in ours]) - np.mean([x <= at for x in theirs])) for at in ours + theirs]
    assert found.notes["statistic"] == pytest.approx(max(gaps))
    assert 0 < found.value <= 1
    assert quality(ours[::-1], theirs[::-1]).value == found.value
    assert quality([-x for x in ours], [-x for x in theirs]).value == pytest.approx(found.value)


def test_probes_without_a_ratio_are_left_out():
    found = quality([0.1, None, 0.3], [0.1, 0.3, None])
    assert (found.value, found.n, found.n_total, found.notes["n_retrained"]) == (1, 2, 3, 2)
    assert quality([None], [0.1]).value is None


def test_there_is_no_quality_without_a_retrained_model():
    found = ForgetQuality()(ratios(0.1))
    assert found.value is None
    assert "retrained" in found.notes["undefined"]
    assert ForgetQuality().beside == ("retrained",)


def test_the_gap_golden():
    found = retrain_gap(mean_of([0.5, 0.5]), mean_of([0.3, 0.5]))
    assert found.signed == pytest.approx(0.1)
    assert found.relative == pytest.approx(25)
    assert found.low == pytest.approx(0)
    assert found.high == pytest.approx(0.2)


def test_the_retrained_model_has_no_gap_to_itself_and_gaps_change_sign():
    a, b = mean_of([0.2, 0.9, 0.4]), mean_of([0.1, 0.3, 0.4])
    assert retrain_gap(a, a) == (0, 0, 0, 0)
    assert retrain_gap(a, b).signed == pytest.approx(-retrain_gap(b, a).signed)


def test_a_negative_reference_counts_by_its_size():
    assert retrain_gap(Measured(value=-1.0), Measured(value=-2.0))[:1] == (1,)
    assert retrain_gap(Measured(value=-1.0), Measured(value=-2.0)).relative == 50


@pytest.mark.parametrize("reference", [0.0, 9e-7, -9e-7])
def test_the_relative_gap_to_nearly_nothing_is_undefined(reference):
    found = retrain_gap(Measured(value=0.5), Measured(value=reference))
    assert found.signed == pytest.approx(0.5 - reference)
    assert found.relative is None


def test_the_gap_of_what_is_undefined_is_undefined():
    assert retrain_gap(undefined("?"), mean_of([0.5])) == (None, None, None, None)
    assert retrain_gap(mean_of([0.5]), undefined("?")) == (None, None, None, None)


def test_improvement_drop():
    whole, none = mean_of([0.8, 0.6]), mean_of([0.2, 0.2])
    assert normalised_improvement_drop(whole, mean_of([0.45, 0.45]), none).value == pytest.approx(0.5)
    assert normalised_improvement_drop(whole, whole, none).value == 0
    gone = normalised_improvement_drop(whole, none, none)
    assert (gone.value, gone.low, gone.high) == pytest.approx((1, 1, 1))
    single = normalised_improvement_drop(*(Measured(value=v) for v in (0.7, 0.45, 0.2)))
    assert (single.value, single.low) == (pytest.approx(0.5), None)


def test_improvement_drop_where_the_codes_never_helped_is_undefined():
    for whole, none in ((0.5, 0.5), (0.4, 0.5)):
        found = normalised_improvement_drop(mean_of([whole]), mean_of([0.3]), mean_of([none]))
        assert found.value is None
        assert found.notes["undefined"] == "the codes did not help"
    assert normalised_improvement_drop(undefined("?"), mean_of([0.3]), mean_of([0.1])).value is None


def test_robustness_is_a_pearson_correlation():
    assert robustness([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert robustness([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    a, b = [0.1, 0.4, 0.2, 0.9], [0.3, 0.5, 0.1, 0.6]
    x, y = (np.array(v) - np.mean(v) for v in (a, b))
    assert robustness(a, b) == pytest.approx(float((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum())))


def test_robustness_needs_three_models_that_differ():
    assert robustness([1, 2], [1, 2]) is None
    assert robustness([1, 2, None, 3], [1, 2, 5, None]) is None
    assert robustness([1, 1, 1], [1, 2, 3]) is None
    assert robustness([1, 2, 3], [2, 2, 2]) is None
