"""Is a generation still language? Two guards: loops, and text that the untouched model finds implausible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MAX_SHARE_OF_ONE_TOKEN = 0.5
MAX_SHARE_OF_REPEATED_4GRAMS = 0.5
MAX_SURPRISE = 4.5
"""Nats a token under the untouched model. Its own greedy text lies near 0.7, its samples at temperature 1
near 2, a shuffled sentence above 6."""


def is_repetitive(ids: Sequence[int]) -> bool:
    """Empty, dominated by one token, or made of 4-grams said before (metrics.md 4.7). ``ids`` without the end token."""
    if not ids:
        return True
    if len(ids) >= 4 and max(Counter(ids).values()) > MAX_SHARE_OF_ONE_TOKEN * len(ids):
        return True
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > MAX_SHARE_OF_REPEATED_4GRAMS


def is_gibberish(ids: Sequence[int], surprise: float | None) -> bool:
    return is_repetitive(ids) or surprise is None or surprise > MAX_SURPRISE
