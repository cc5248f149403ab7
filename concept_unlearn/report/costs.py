"""What every method costs, as a table of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import words
from .report import Report

_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "n_bytes": ("size", words.size),
    "n_parameters": ("numbers", words.count),
    "latency": ("forward pass", lambda factor: words.shown("factor", factor)),
    "fit_seconds": ("made in", words.seconds),
    "fit_cpu_seconds": ("CPU time", words.seconds),
    "peak_mb": ("memory", lambda mb: words.size(mb * 2**20)),
    "forward_tokens": ("tokens in", words.count),
    "backward_tokens": ("trained on", words.count),
    "access": ("needs", str),
}
"""By field of a cost."""


class Costs(NamedTuple):
    heads: list[str]
    rows: dict[str, list[str]]
    """By entry."""


def costs(report: Report) -> Costs | None:
    """Columns that somebody measured. None where nobody measured anything."""
    known = {label: entry.cost for label, entry in report.labelled.items() if entry.cost}
    if not known:
        return None
    fields = [f for f in _COLUMNS if any(getattr(cost, f) is not None for cost in known.values())]
    rows = {
        label: [words.NONE if (value := getattr(cost, f)) is None else _COLUMNS[f][1](value) for f in fields]
        for label, cost in known.items()
    }
    return Costs([_COLUMNS[f][0] for f in fields], rows)
