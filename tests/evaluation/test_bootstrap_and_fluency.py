from __future__ import annotations

import numpy as np
import pytest

from concept_unlearn.evaluation.bootstrap import Estimate, estimate
from concept_unlearn.evaluation.fluency import is_repetitive


def test_the_mean_with_its_interval():
    found = estimate([[0.0, 1.0] * 200])
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
    assert found.n == 400


def test_an_interval_covers_what_it_should():
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        found = estimate([generator.normal(size=60).tolist()], seed=i)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 200 <= 0.98


def test_two_columns_are_resampled_together():
    """Of equal columns the ratio is 1 whatever is drawn; drawn apart it would spread."""
    column = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert estimate([column, column], lambda a, b: a / b) == Estimate(1.0, 1.0, 1.0, 6)


def test_undefined_examples_are_left_out_and_counted():
    assert estimate([[1.0, None, 0.0, None]]).n == 2
    assert estimate([[1.0, None], [None, 1.0]], lambda a, b: a + b) == Estimate(None, None, None, 0)
    assert estimate([[]]) == Estimate(None, None, None, 0)


def test_a_ratio_to_nothing_is_undefined_and_no_warning():
    assert estimate([[1.0, 1.0], [0.0, 0.0]], lambda a, b: a / b).value is None


def test_the_same_seed_gives_the_same_interval():
    data = [np.random.default_rng(1).normal(size=50).tolist()]
    assert estimate(data) == estimate(data)
    assert estimate(data, seed=1) != estimate(data)


@pytest.mark.parametrize(
    ("ids", "repetitive"),
    [
        ([], True),
        ([5], False),
        ([5, 5, 5], False),
        ([5, 5, 5, 5], True),
        ([5, 5, 5, 6, 7, 8], False),
        ([1, 2, 3, 4] * 6, True),
        (list(range(30)), False),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5], False),
    ],
)
def test_loops_are_told_from_language(ids, repetitive):
    assert is_repetitive(ids) == repetitive
