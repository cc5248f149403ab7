"""Methods x columns: the table that the terminal, the page and the paper share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..evaluation.benchmark import Line
from . import words
from .reading import Reading, gap, line_of, raw, read, shown_lines, worst_case
from .report import Entry, Report

Role = Literal["base", "retrained", "method", "seed", "as made"]


class Cell(NamedTuple):
    value: str = words.NONE
    beside: str = ""
    """Its interval; of a worst case the attack."""
    sd: str = ""
    """Over seeds, of which the value is the mean."""
    why: str = ""
    """Why there is no value."""

    @property
    def text(self) -> str:
        return f"{self.value} ± {self.sd}" if self.sd else self.value


class Row(NamedTuple):
    role: Role
    """"seed" and "as made" belong to the method above."""
    name: str
    """That stands for itself, such as "npo, seed 1, as made"."""
    label: str
    """Beneath the row that it belongs to."""
    about: str
    mark: int | None
    """Of the method in plots, from 0."""
    cells: tuple[Cell, ...]
    strength: Cell
    worst: Cell
    gap: Cell


def columns(report: Report) -> list[Line]:
    """The lines with a short name; of a benchmark that names none, the headline and what calibration keeps."""
    named = [line for line in shown_lines(report) if line.column]
    return named or [line_of(report, metric) for metric in dict.fromkeys((report.headline, report.keeps))]


def grid(report: Report, lines: Sequence[Line] | None = None) -> list[Row]:
    """The untouched and the retrained model; every method, and beneath it how it was made and its seeds.

    A cell for each of ``lines``, by default ``columns(report)``.
    """
    table = _Table(report, columns(report) if lines is None else lines)
    found = [table.row("base", ("untouched",), [report.base])]
    if report.retrained:
        found.append(table.row("retrained", ("retrained",), [report.retrained]))
    for mark, (name, entries) in enumerate(report.groups.items()):
        found += table.method(name, entries, mark)
    return found


class _Table:
    def __init__(self, report: Report, lines: Sequence[Line]) -> None:
        self.report, self.columns, self.headline = report, lines, line_of(report, report.headline)

    def method(self, name: str, entries: Sequence[Entry], mark: int) -> list[Row]:
        found = [self.row("method", (name,), entries, mark)]
        if any(e.as_made for e in entries):
            found.append(self.row("as made", (name, "as made"), [_as_made(e) for e in entries], mark))
        if len(entries) > 1:
            found += [self.row("seed", (name, f"seed {e.seed}"), [e], mark) for e in entries]
        return found

    def row(self, role: Role, path: tuple[str, ...], entries: Sequence[Entry], mark: int | None = None) -> Row:
        about = entries[0].about if role != "as made" else ""
        name, label = ", ".join(path), path[-1]
        if len(entries) > 1 and role == "method":
            name, label = f"{name} ({len(entries)} seeds)", f"{label} ({len(entries)} seeds)"
        cells = tuple(_cell([read(self.report, line, e.results) for e in entries]) for line in self.columns)
        strength = Cell() if mark is None else _cell([Reading("number", e.strength) for e in entries])
        return Row(role, name, label, about, mark, cells, strength, self.worst(entries), self.gap(entries))

    def worst(self, entries: Sequence[Entry]) -> Cell:
        found = [pair for e in entries if (pair := worst_case(self.report, e))]
        if not found:
            return Cell(why="not attacked")
        cell = _cell([Reading(raw(self.headline.kind), value) for _, value in found])
        return cell._replace(beside=found[0][0] if len({name for name, _ in found}) == 1 else "varies")

    def gap(self, entries: Sequence[Entry]) -> Cell:
        found = [d for e in entries if (d := gap(self.report, self.headline, e.results)) is not None]
        return Cell(words.gap(self.headline.kind, statistics.fmean(found))) if found else Cell(why="no retrained model")


def _as_made(entry: Entry) -> Entry:
    """At strength 1, where nobody attacked it."""
    return entry.model_copy(update={"results": entry.as_made or entry.results, "strength": 1.0, "attacks": {}})


def _cell(readings: Sequence[Reading]) -> Cell:
    """One value with its interval, or mean and standard deviation over seeds."""
    known = [r.value for r in readings if r.value is not None]
    if len(readings) == 1 or not known:
        return Cell(readings[0].text, readings[0].interval, why=readings[0].why)
    kind, mean = readings[0].kind, words.shown(readings[0].kind, statistics.fmean(known))
    return Cell(mean, sd=words.deviation(kind, statistics.stdev(known)) if len(known) > 1 else "")
