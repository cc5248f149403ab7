"""What a line of a report says about one model, in the unit in which it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..evaluation.attacks.base import worst
from ..evaluation.benchmark import Kind, Line
from ..evaluation.measured import Measured, compared
from . import words
from .report import Entry, Report


class Reading(NamedTuple):
    kind: Kind
    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""
    """Why there is no value."""

    @property
    def text(self) -> str:
        return words.shown(self.kind, self.value)

    @property
    def interval(self) -> str:
        return words.interval(self.kind, self.low, self.high)


def read(report: Report, line: Line, results: Mapping[str, Measured]) -> Reading:
    """A factor is of the untouched model's value, which itself is read as a number."""
    found, before = results.get(line.metric), report.base.results.get(line.metric)
    if found is None:
        return Reading(line.kind, None, why="not measured")
    if found.value is None:
        return Reading(line.kind, None, why=str(found.notes.get("undefined", "undefined")))
    if line.kind != "factor":
        return Reading(line.kind, found.value, found.low, found.high)
    if found is before or before is None:
        return Reading("number", found.value, found.low, found.high)
    return Reading("factor", *compared(found, before))


def gap(report: Report, line: Line, results: Mapping[str, Measured]) -> float | None:
    """To the retrained model: after - retrained, of a factor after / retrained - 1. None where there is none."""
    after = results.get(line.metric)
    wanted = report.retrained.results.get(line.metric) if report.retrained else None
    if after is None or wanted is None:
        return None
    if line.kind != "factor":
        return compared(after, wanted, "difference")[0]
    ratio = compared(after, wanted)[0]
    return None if ratio is None else ratio - 1


def worst_case(report: Report, entry: Entry) -> tuple[str, float] | None:
    """The attack that gets most out of it, and how much. None if it was not attacked."""
    return worst(entry.attacks, entry.results, report.headline) if entry.attacks else None


def shown_lines(report: Report) -> list[Line]:
    """Those whose metric was measured."""
    known = {metric for entry in (report.base, *report.entries) for metric in entry.results}
    return [line for line in report.lines if line.metric in known]


def line_of(report: Report, metric: str) -> Line:
    """Its first line; where it has none, one that calls it by its name."""
    own = (line for line in report.lines if line.metric == metric)
    return next(own, Line(section="", label=metric, metric=metric, kind="number"))


def raw(kind: Kind) -> Kind:
    """Of a value itself, where a line shows multiples."""
    return "number" if kind == "factor" else kind


class Told(NamedTuple):
    """A line of the first entry's, beside the models that it is compared with."""

    line: Line
    before: Reading
    after: Reading
    retrained: Reading | None
    gap: str


def told(report: Report) -> list[Told]:
    return [
        Told(
            line,
            read(report, line, report.base.results),
            read(report, line, report.main.results),
            read(report, line, report.retrained.results) if report.retrained else None,
            words.gap(line.kind, gap(report, line, report.main.results)),
        )
        for line in shown_lines(report)
    ]


def lacking(report: Report) -> list[str]:
    """A line on each method that is not there."""
    return [f"{name} is missing: {' '.join(why.split()).rstrip('.')}" for name, why in report.missing.items()]


def examples(report: Report, n: int = 3) -> list[tuple[str, int]]:
    """Set and index of a few with replies: what was to be forgotten, and last what was to be kept; messages first."""
    asked = [name for name in report.questions if name in report.base.said and name in report.main.said]
    if not asked:
        return []
    forgotten = _set_of(report.headline, asked) or asked[0]
    kept = _set_of(report.keeps, asked) or next((name for name in asked if name != forgotten), forgotten)
    wanted = {forgotten: n} if kept == forgotten else {forgotten: n - 1, kept: 1}
    picks = []
    for name, few in wanted.items():
        questions = report.questions[name]
        order = sorted(range(len(questions)), key=lambda i: (not questions[i].chat, i))
        picks += [(name, i) for i in order[:few]]
    return picks


def _set_of(metric: str, sets: Iterable[str]) -> str | None:
    return next((name for name in sets if metric.startswith(f"{name}/")), None)
