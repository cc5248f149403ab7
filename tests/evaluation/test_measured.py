"""A number with its interval: over items, paired with another, of several sets at once, and never invented."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concept_unlearn.evaluation.measured import RESAMPLES, Measured, compared, mean_of, resampled, undefined


def draw(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).tolist()


def by_hand(*columns, statistic, seed=0):
    """Percentiles of a statistic of columns of items that are drawn again together."""
    table, generator = np.array(columns).T, np.random.default_rng(seed)
    picks = generator.integers(len(table), size=(RESAMPLES, len(table)))
    return np.percentile([statistic(*table[row].T) for row in picks], [2.5, 97.5])


class TestMean:
    def test_is_over_the_items_that_are_defined(self):
        found = mean_of([1.0, None, 0.0, 1.0])
        assert (found.value, found.n, found.n_total) == (pytest.approx(2 / 3), 3, 4)
        assert found.values == (1.0, None, 0.0, 1.0)
        assert found.is_mean
        without = mean_of([1.0, 0.0, 1.0])
        assert (found.low, found.high) == (without.low, without.high)

    @pytest.mark.parametrize("values", [[], [None, None]])
    def test_of_nothing_is_undefined_and_says_so(self, values):
        found = mean_of(values)
        assert (found.value, found.low, found.high, found.n, found.n_total) == (None, None, None, 0, len(values))
        assert found.notes["undefined"]

    def test_has_the_interval_of_items_drawn_again(self):
        values = draw(40)
        found = mean_of(values)
        assert (found.low, found.high) == pytest.approx(tuple(by_hand(values, statistic=np.mean)))
        assert found == mean_of(values)

    def test_may_weigh_its_items(self):
        values, weights = draw(30), [float(1 + i % 5) for i in range(30)]
        found = mean_of(values, weights=weights)
        assert found.value == pytest.approx(np.average(values, weights=weights))
        expected = by_hand(values, weights, statistic=lambda v, w: np.average(v, weights=w))
        assert (found.low, found.high) == pytest.approx(tuple(expected))
        assert mean_of(values, weights=[2.0] * 30).value == pytest.approx(mean_of(values).value)
        gone = mean_of([*values, None], weights=[*weights, 1000.0])
        assert (gone.value, gone.low) == pytest.approx((found.value, found.low))

    def test_on_an_exponential_scale_is_a_perplexity(self):
        nll, n = [abs(x) for x in draw(30)], [float(1 + i % 7) for i in range(30)]
        found = mean_of(nll, weights=n, scale="exp")
        log = mean_of(nll, weights=n)
        assert found.value == pytest.approx(math.exp(np.dot(nll, n) / sum(n)))
        assert [found.low, found.high] == pytest.approx([math.exp(log.low), math.exp(log.high)], rel=1e-3)
        assert mean_of([1000.0], scale="exp").value == math.inf

    def test_of_equal_items_has_no_width(self):
        found = mean_of([0.25] * 9)
        assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
    def test_lies_within_its_interval_and_the_interval_within_the_items(self, values):
        found = mean_of(values)
        rounding = 1e-9
        assert min(values) - rounding <= found.low <= found.high <= max(values) + rounding
        assert min(values) - rounding <= found.value <= max(values) + rounding

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0, 5))
    def test_is_monotone_as_are_its_ends(self, values, more):
        low, high = mean_of(values), mean_of([v + more for v in values])
        for name in ("value", "low", "high"):
            assert getattr(high, name) == pytest.approx(getattr(low, name) + more, abs=1e-9)

    def test_narrows_with_more_items(self):
        few, many = mean_of(draw(20)), mean_of(draw(20) * 25)
        assert many.high - many.low < (few.high - few.low) / 4


class TestCompared:
    def test_is_paired_item_by_item(self):
        before, after = draw(40), draw(40, seed=1)
        found = compared(mean_of(after), mean_of(before), "difference")
        assert found[0] == pytest.approx(np.mean(after) - np.mean(before))
        expected = by_hand(after, before, statistic=lambda a, b: a.mean() - b.mean())
        assert found[1:] == pytest.approx(tuple(expected))

    def test_with_itself_is_nothing_with_certainty(self):
        one = mean_of(draw(40))
        assert compared(one, one, "difference") == (0, 0, 0)
        assert compared(one, one) == pytest.approx((1, 1, 1))

    def test_of_perplexities_is_their_factor(self):
        weights = [float(1 + i % 3) for i in range(20)]
        before = mean_of([1.0 + i / 20 for i in range(20)], weights=weights, scale="exp")
        after = mean_of([2.0 + i / 20 for i in range(20)], weights=weights, scale="exp")
        assert compared(after, before) == pytest.approx((math.e,) * 3)
        log = [mean_of(m.values, weights=weights) for m in (after, before)]
        assert compared(*log, "difference") == pytest.approx((1, 1, 1))

    def test_leaves_out_items_that_one_of_them_lacks(self):
        before, after = [1.0, None, 3.0, 4.0], [2.0, 5.0, None, 6.0]
        assert compared(mean_of(after), mean_of(before), "difference")[0] == pytest.approx(4.0 - 2.5)
        assert compared(mean_of([None, 1.0]), mean_of([1.0, None])) == (None, None, None)

    def test_of_what_is_no_mean_has_no_interval(self):
        assert compared(Measured(value=3.0), Measured(value=2.0)) == (1.5, None, None)
        assert compared(Measured(value=3.0), Measured(value=2.0), "difference") == (1.0, None, None)
        assert compared(mean_of([3.0, 3.0]), mean_of([2.0])) == (1.5, None, None)

    @pytest.mark.parametrize("zero", [Measured(value=0.0), mean_of([0.0, 0.0])], ids=["number", "mean"])
    def test_with_zero_as_a_ratio_is_undefined(self, zero):
        more = Measured(value=1.0) if not zero.is_mean else mean_of([1.0, 1.0])
        assert compared(more, zero) == (None, None, None)
        assert compared(zero, zero) == (None, None, None)
        assert compared(zero, more)[0] == 0
        assert compared(more, zero, "difference")[0] == 1

    def test_with_what_is_undefined_is_undefined(self):
        for how in ("ratio", "difference"):
            assert compared(undefined("no reference"), mean_of([1.0]), how) == (None, None, None)
            assert compared(mean_of([1.0]), undefined("no reference"), how) == (None, None, None)


class TestResampled:
    def test_draws_each_set_again_by_itself(self):
        one, other = draw(30), draw(20, seed=1)
        groups = {"a": [[x] for x in one], "b": [[x] for x in other]}
        found = resampled(groups, lambda t: float(t["a"].mean() - t["b"].mean()))
        assert found.value == pytest.approx(np.mean(one) - np.mean(other))
        spread = (np.var(one) / 30 + np.var(other) / 20) ** 0.5
        assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
        assert (found.n, found.n_total, found.is_mean) == (50, 50, False)

    def test_of_one_set_and_a_mean_is_the_mean(self):
        values = draw(50)
        found = resampled({"a": [[v] for v in values]}, lambda t: float(t["a"].mean()))
        assert (found.value, found.low, found.high) == pytest.approx(
            [getattr(mean_of(values), name) for name in ("value", "low", "high")], abs=0.03
        )

    def test_is_seeded(self):
        groups = {"a": [[v] for v in draw(10)]}

        def mean(tables):
            return float(tables["a"].mean())

        assert resampled(groups, mean) == resampled(groups, mean)
        assert resampled(groups, mean, seed=1).low != resampled(groups, mean).low

    def test_leaves_out_items_with_an_undefined_column(self):
        found = resampled({"a": [[1.0, 2.0], [None, 5.0], [3.0, 4.0]]}, lambda t: float(t["a"].mean()))
        assert (found.value, found.n, found.n_total) == (2.5, 2, 3)

    @pytest.mark.parametrize("value", [None, float("nan")])
    def test_of_what_has_no_value_is_undefined(self, value):
        found = resampled({"a": [[1.0]]}, lambda _: value)
        assert (found.value, found.low, found.high) == (None, None, None)

    def test_asks_for_no_interval_where_there_is_none(self):
        assert resampled({"a": [[1.0]]}, lambda _: math.inf).value == math.inf
        assert resampled({"a": [[1.0]]}, lambda _: math.inf).low is None
        calls = iter([2.0])
        assert resampled({"a": [[1.0]]}, lambda _: next(calls, None)).low is None


def test_undefined_is_never_a_number():
    found = undefined("no reference", 7)
    assert (found.value, found.low, found.high, found.n, found.n_total) == (None, None, None, 0, 7)
    assert found.notes == {"undefined": "no reference"}


@pytest.mark.parametrize(
    "found",
    [mean_of([1.0, None, 0.5], weights=[1.0, 2.0, 3.0]), mean_of([1000.0, 1.0], scale="exp"), undefined("why")],
)
def test_a_measurement_survives_json(found):
    assert Measured.model_validate_json(found.model_dump_json()) == found
