"""Percentile bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value with its 95 % interval; all None where nothing is defined. Undefined examples are left out."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Examples that count."""


def estimate(
    columns: Sequence[Sequence[float | None]],
    statistic: Callable[..., Any] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """``statistic`` of the columns' means, resampled over examples, all columns together (so that ratios of
    two columns are paired). It gets one array of means a column. Default: the mean of the only column.
    """
    table = [row for row in zip(*columns, strict=True) if None not in row]
    if not table:
        return Estimate(None, None, None, 0)
    data = np.asarray(table, dtype=float)
    combine = statistic or (lambda mean: mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(combine(*data.mean(0)))
    picks = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    means = data[picks].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.asarray(combine(*means.T), dtype=float)
    spread = spread[np.isfinite(spread)]
    if not np.isfinite(value) or not len(spread):
        return Estimate(None, None, None, len(data))
    low, high = np.percentile(spread, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(data))
