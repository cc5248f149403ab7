"""Values as text, by kind: a share, a number, or a multiple of what the untouched model has."""

from __future__ import annotations

import math

from ..evaluation.benchmark import Kind

NONE = "–"


def shown(kind: Kind, value: float | None) -> str:
    if value is None:
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if kind == "percent":
        return f"{_percent(value)}%"
    return f"{value:.3g}" if kind == "number" else f"×{_factor(value)}"


def interval(kind: Kind, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    if kind == "percent":
        return f"{_range(_percent(low), _percent(high))}%"
    number = _factor if kind == "factor" else "{:.3g}".format
    return _range(number(low), number(high))


def deviation(kind: Kind, sd: float) -> str:
    """Two digits of a standard deviation."""
    return f"{100 * sd:.2g}%" if kind == "percent" else f"{sd:.2g}"


def gap(kind: Kind, difference: float | None) -> str:
    """Of a share in percentage points, of a factor in percent."""
    if difference is None or math.isinf(difference):
        return shown("number", difference)
    if kind == "number":
        return f"{difference:+.2g}"
    return f"{round(100 * difference, 1):+g}{' pt' if kind == 'percent' else '%'}"


def size(n_bytes: float) -> str:
    """1.5 MB"""
    return _scaled(n_bytes, 1024, (" B", " KB", " MB", " GB"))


def seconds(value: float) -> str:
    """45 s, 12 min or 3.5 h"""
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count(n: float) -> str:
    """950, 12.3 k or 4.56 M"""
    return _scaled(n, 1000, ("", " k", " M", " G"))


def _scaled(n: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if n < 999.5:
            return f"{n:.3g}{unit}"
        n /= step
    return f"{n:.3g}{units[-1]}"


def _percent(share: float) -> str:
    """Whole from 10 % on, below that with one digit more."""
    percent = 100 * share
    return f"{percent:.0f}" if abs(percent) >= 9.95 or round(percent, 1) == round(percent) else f"{percent:.1f}"


def _factor(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _range(low: str, high: str) -> str:
    return f"{low} to {high}" if low.startswith("-") else f"{low}–{high}"
