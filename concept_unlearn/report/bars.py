"""What leaks of every method, asked plainly and under each attack, as lengths of bars."""

from __future__ import annotations

import math
from typing import NamedTuple

from . import words
from .reading import line_of, raw, worst_case
from .report import Entry, Report

CLEAN = "asked plainly"


class Bar(NamedTuple):
    name: str
    value: str
    length: float | None
    """From 0 to 1, as is ``ceiling``: where the untouched model is under the same attack."""
    ceiling: float | None
    is_worst: bool
    why: str


class Bars(NamedTuple):
    label: str
    mark: int
    bars: list[Bar]


def bars(report: Report) -> list[Bars]:
    """Of the headline, every attack in one order. Empty if nothing was attacked."""
    names = list(dict.fromkeys(name for entry in report.entries for name in entry.attacks))
    if not names:
        return []
    ceilings = _leaks(report, report.base)
    everything = [ceilings, *(_leaks(report, e) for e in report.entries)]
    known = [v for leaks in everything for v in leaks.values() if v is not None and math.isfinite(v)]
    kind = raw(line_of(report, report.headline).kind)
    low, high = min(0.0, *known, 0.0), max(1.0 if kind == "percent" else 0.0, *known, 0.0)

    def length(value: float | None) -> float | None:
        return None if value is None else min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)

    def bar(entry: Entry, name: str) -> Bar:
        found, outcome = worst_case(report, entry), entry.attacks.get(name)
        value, ceiling = _leaks(report, entry).get(name), ceilings.get(name)
        why = "" if name == CLEAN else "not tried" if outcome is None else outcome.skipped or ""
        is_worst = found is not None and found[0] == ("clean" if name == CLEAN else name)
        return Bar(name, words.shown(kind, value), length(value), length(ceiling), is_worst, why)

    marks = {name: mark for mark, name in enumerate(report.groups)}
    return [
        Bars(label, marks[entry.name], [bar(entry, name) for name in (CLEAN, *names)])
        for label, entry in report.labelled.items()
        if entry.attacks
    ]


def _leaks(report: Report, entry: Entry) -> dict[str, float | None]:
    found = {CLEAN: entry.results} | {name: outcome.results for name, outcome in entry.attacks.items()}
    return {name: results[report.headline].value for name, results in found.items() if report.headline in results}
