"""The interval of a firing rate: Wilson's where tokens are independent, and wider where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from concept_unlearn.features.show.rate import firing_rate

PASSAGES = st.lists(
    st.integers(1, 30).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size))), min_size=1, max_size=40
)


def rate(passages):
    y, m = zip(*passages, strict=True)
    return firing_rate(
        fired=sum(y), tokens=sum(m), passages=len(m), fired_squared=sum(a * a for a in y),
        fired_by_size=sum(a * b for a, b in passages), size_squared=sum(b * b for b in m),
    )  # fmt: skip


@pytest.mark.parametrize(("fired", "n"), [(0, 20), (1, 20), (7, 20), (20, 20), (1, 1)])
def test_passages_of_one_token_have_the_interval_of_wilson(fired, n):
    found = rate([(int(i < fired), 1) for i in range(n)])
    expected = binomtest(fired, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(PASSAGES)
def test_the_interval_holds_the_rate_and_lies_between_0_and_1(passages):
    found = rate(passages)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(PASSAGES, st.integers(2, 5))
def test_saying_every_token_several_times_teaches_nothing(passages, times):
    """Unless tokens were more evenly spread than by chance, which is not taken as knowledge."""
    once, often = rate(passages), rate([(times * y, times * m) for y, m in passages])
    assert often.value == pytest.approx(once.value)
    if 0 < once.fired < once.tokens and not is_even(passages):
        assert often.high - often.low == pytest.approx(once.high - once.low, rel=1e-6)


def is_even(passages):
    r = sum(y for y, _ in passages) / sum(m for _, m in passages)
    return sum((y - r * m) ** 2 for y, m in passages) < r * (1 - r) * sum(m for _, m in passages)


def test_a_feature_of_a_single_passage_is_known_less_well_than_one_spread_over_all():
    together = rate([(10, 10)] + [(0, 10)] * 9)
    spread = rate([(1, 10)] * 10)
    assert together.value == spread.value
    assert together.high - together.low > 1.5 * (spread.high - spread.low)
