"""A metric's value with its interval: percentile bootstrap over items, seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, field_validator

from ..component import Frozen

RESAMPLES = 1000

Values = Sequence[float | None]
Table = Float[np.ndarray, "items columns"]


class Measured(Frozen):
    """One number about one model. All None where nothing is defined: never 0, never NaN."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    value: float | None
    low: float | None = None
    """Of the 95 % interval, as is ``high``."""
    high: float | None = None
    n: int = 0
    """Items that count."""
    n_total: int = 0
    values: tuple[float | None, ...] = ()
    """Of each item, where the metric is a mean over the items of one set; None of an undefined one."""
    weights: tuple[float, ...] = ()
    """Of each item in that mean; all alike where there are none."""
    scale: Literal["linear", "exp"] = "linear"
    """exp: the value is the exponential of the mean, as perplexity is."""
    notes: dict[str, float | str | None] = Field(default_factory=dict)
    """What else belongs to the number: a statistic, a tie rate, why it is undefined."""

    @field_validator("notes")
    @classmethod
    def _infinite_again(cls, notes: dict[str, float | str | None]) -> dict[str, float | str | None]:
        """As JSON writes it, infinity is a string."""
        return {k: float(v) if v in ("Infinity", "-Infinity") else v for k, v in notes.items()}

    @property
    def is_mean(self) -> bool:
        return bool(self.values)


def mean_of(
    values: Values,
    *,
    weights: Sequence[float] = (),
    scale: Literal["linear", "exp"] = "linear",
    notes: Mapping[str, float | str | None] | None = None,
) -> Measured:
    """The mean over the items that are defined."""
    kept = [i for i, value in enumerate(values) if value is not None]
    value, low, high = _interval(_table(values, weights, kept), _scaled(scale))
    why = {} if kept else {"undefined": "undefined for every example" if values else "the set is empty"}
    return Measured(
        value=value, low=low, high=high, n=len(kept), n_total=len(values), values=tuple(values),
        weights=tuple(weights), scale=scale, notes={**why, **(notes or {})},
    )  # fmt: skip


def compared(
    after: Measured, before: Measured, how: Literal["ratio", "difference"] = "ratio"
) -> tuple[float | None, float | None, float | None]:
    """Value and interval of after / before or after - before, item by item where both are means over the same items."""
    if after.is_mean and before.is_mean and len(after.values) == len(before.values):
        pairs = list(zip(after.values, before.values, strict=True))
        kept = [i for i, pair in enumerate(pairs) if None not in pair]
        scale = _scaled(after.scale)
        tables = [_table(m.values, m.weights, kept) for m in (after, before)]

        def combine(means: np.ndarray) -> np.ndarray:
            a, b = scale(means[..., :2]), scale(means[..., 2:])
            return np.where(b == 0, np.nan, a / b) if how == "ratio" else np.asarray(a - b)

        return _interval(np.concatenate(tables, 1), combine)
    if after.value is None or before.value is None or (how == "ratio" and before.value == 0):
        return None, None, None
    return (after.value / before.value if how == "ratio" else after.value - before.value), None, None


def resampled(
    groups: Mapping[str, Sequence[Sequence[float | None]]],
    statistic: Callable[[Mapping[str, Table]], float | None],
    *,
    notes: Mapping[str, float | str | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured:
    """``statistic`` of several sets at once: ``groups[name]`` is a row of columns an item, resampled set by set.

    Items with an undefined column are left out.
    """
    kept = {name: np.array([r for r in rows if None not in r], dtype=float) for name, rows in groups.items()}
    n, n_total = sum(map(len, kept.values())), sum(map(len, groups.values()))
    value = statistic(kept)
    found = Measured(value=value, n=n, n_total=n_total, notes=dict(notes or {}))
    if value is None or not np.isfinite(value):
        return found.model_copy(update={"value": None if value is None or np.isnan(value) else value})
    generator, spread = np.random.default_rng(seed), []
    for _ in range(resamples):
        again = statistic({k: t[generator.integers(len(t), size=len(t))] if len(t) else t for k, t in kept.items()})
        if again is not None and np.isfinite(again):
            spread.append(again)
    if not spread:
        return found
    low, high = np.percentile(spread, [2.5, 97.5])
    return found.model_copy(update={"low": float(low), "high": float(high)})


def undefined(why: str, n_total: int = 0, *, notes: Mapping[str, float | str | None] | None = None) -> Measured:
    return Measured(value=None, n_total=n_total, notes={**(notes or {}), "undefined": why})


def _table(values: Values, weights: Sequence[float], kept: Sequence[int]) -> Table:
    """(weighted value, weight) of the items that are kept."""
    w = np.array([weights[i] if weights else 1.0 for i in kept], dtype=float)
    v = np.array([values[i] for i in kept], dtype=float)
    return np.stack([v * w, w], 1)


def _scaled(scale: str) -> Callable[[np.ndarray], np.ndarray]:
    """From (mean of weighted values, mean weight) to the value."""

    def value(means: np.ndarray) -> np.ndarray:
        found = means[..., 0] / means[..., 1]
        return np.exp(found) if scale == "exp" else np.asarray(found)

    return value


def _interval(
    table: np.ndarray, combine: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    if not len(table):
        return None, None, None
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = float(combine(table.mean(0)))
        spread = combine(np.einsum("rn,nc->rc", _counts(len(table), seed), table) / len(table))
    spread = spread[np.isfinite(spread)]
    if np.isnan(value):
        return None, None, None
    if not np.isfinite(value) or not len(spread):
        return value, None, None
    low, high = np.percentile(spread, [2.5, 97.5])
    return value, float(low), float(high)


@lru_cache(maxsize=2)
def _counts(n: int, seed: int) -> np.ndarray:
    """How often each of n items is in each resample."""
    picks = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    return np.stack([np.bincount(row, minlength=n) for row in picks]).astype(float)
