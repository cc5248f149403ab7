"""Loops are no language, and nor is what the untouched model finds implausible."""

from __future__ import annotations

import pytest

from concept_unlearn.evaluation.fluency import MAX_SURPRISE, is_gibberish, is_repetitive


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


@pytest.mark.parametrize(
    ("ids", "surprise", "gibberish"),
    [((5, 6, 7), 1.0, False), ((5, 6, 7), MAX_SURPRISE + 0.1, True), ((5, 5, 5, 5), 1.0, True), ((), None, True)],
)
def test_gibberish_is_a_loop_or_implausible(ids, surprise, gibberish):
    assert is_gibberish(ids, surprise) == gibberish
