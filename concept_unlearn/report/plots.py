"""Plots of a report: what is forgotten against what is kept, how strengths were found, what effort buys an attacker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from ..evaluation.benchmark import Kind
from . import words
from .drawing import Drawing
from .plane import INK, Plane, Point, axis, colour
from .reading import line_of, raw
from .report import Entry, Report


class _Place(NamedTuple):
    """A model by what it keeps (x) and what leaks (y), each with its interval."""

    x: float
    y: float
    x_interval: Point | None
    y_interval: Point | None

    @property
    def point(self) -> Point:
        return self.x, self.y

    @property
    def extent(self) -> tuple[list[float], list[float]]:
        return [self.x, *(self.x_interval or ())], [self.y, *(self.y_interval or ())]


def tradeoff(report: Report) -> Drawing | None:
    """Every method by what it keeps and what leaks, calibrated and, hollow, as made; wanted is the lower right corner.

    The stairs are the front: no method leaks less and keeps as much. None where no method has both numbers.
    """
    kept, left = line_of(report, report.keeps), line_of(report, report.headline)
    base, retrained = _place(report, report.base), report.retrained and _place(report, report.retrained)
    methods = [
        (mark, entry, place, _place(report, entry, as_made=True) if entry.as_made else None)
        for mark, entry in _marked(report)
        if (place := _place(report, entry))
    ]
    if not methods:
        return None
    placed = [p for *_, one, two in methods for p in (one, two) if p]
    extents = [p.extent for p in placed] + [([p.x], [p.y]) for p in (base, retrained) if p]
    plane = Plane(
        axis(kept.label, raw(kept.kind), (v for x, _ in extents for v in x)),
        axis(left.label, raw(left.kind), (v for _, y in extents for v in y)),
    )
    plane.line(_stairs(p.point for p in placed), INK, width=6, opacity=0.13)
    for mark, entry, place, made in methods:
        shade, name, title = colour(mark), str(mark + 1), _title(report, entry)
        if made:
            plane.line([made.point, place.point], shade, opacity=0.6)
            plane.mark(made.point, "ring", shade, f"{title}, as made: {_told(left.kind, kept.kind, made)}")
        for ends in _whiskers(place):
            plane.line(ends, shade, width=1, opacity=0.5)
        plane.mark(place.point, "dot", shade, f"{title}: {_told(left.kind, kept.kind, place)}", name=name)
    if base:
        plane.mark(base.point, "square", INK, f"untouched: {_told(left.kind, kept.kind, base)}", name="untouched")
    if retrained:
        plane.across(retrained.y)
        plane.mark(
            retrained.point, "diamond", INK, f"retrained: {_told(left.kind, kept.kind, retrained)}", name="retrained"
        )
    return plane.drawn(f"{left.label} against {kept.label}")


def calibration(report: Report) -> Drawing | None:
    """Retained utility by strength, as tried; the filled point is what was chosen. None if nothing was calibrated."""
    curves = [(mark, entry, _finite(entry.curve)) for mark, entry in _marked(report)]
    curves = [(mark, entry, curve) for mark, entry, curve in curves if curve]
    if not curves:
        return None
    x = axis("strength", "number", (s for *_, curve in curves for s, _ in curve))
    y = axis("retained utility, 1 = as asked", "number", (1.0, *(u for *_, curve in curves for _, u in curve)))
    plane = Plane(x, y)
    plane.across(1.0)
    for mark, entry, curve in curves:
        plane.line(curve, colour(mark))
        for s, u in curve:
            is_chosen = math.isclose(s, entry.strength)
            title = f"{_title(report, entry)}: strength {s:.3g}, utility {u:.3g}"
            name = str(mark + 1) if is_chosen else ""
            plane.mark(
                (s, u), "dot" if is_chosen else "ring", colour(mark), title, name=name, size=5 if is_chosen else 2.5
            )
    return plane.drawn("retained utility by strength")


def efforts(report: Report) -> dict[str, Drawing]:
    """By attack, what leaks for more of its effort; only of attacks that were tried with more than one."""
    headline, found = line_of(report, report.headline), {}
    for name in dict.fromkeys(name for _, entry in _marked(report) for name in entry.attacks):
        tried = [(mark, e, _finite(e.attacks[name].curve)) for mark, e in _marked(report) if name in e.attacks]
        tried = [(mark, entry, curve) for mark, entry, curve in tried if curve]
        if len({effort for *_, curve in tried for effort, _ in curve}) < 2:
            continue
        ceiling = report.base.attacks[name].curve if name in report.base.attacks else ()
        curves = [*(curve for *_, curve in tried), _finite(ceiling)]
        x = axis(f"effort of {name}", "number", (e for curve in curves for e, _ in curve))
        plane = Plane(x, axis(headline.label, raw(headline.kind), (v for curve in curves for _, v in curve)))
        if ceiling:
            plane.line(_finite(ceiling), INK, dash="4 4", opacity=0.6)
        for mark, entry, curve in tried:
            plane.line(curve, colour(mark))
            for point in curve:
                is_last = point == curve[-1]
                title = f"{_title(report, entry)}: {words.shown(raw(headline.kind), point[1])} after {point[0]:g}"
                plane.mark(point, "dot", colour(mark), title, name=str(mark + 1) if is_last else "", size=3)
        found[name] = plane.drawn(f"{headline.label} by effort of {name}")
    return found


def _marked(report: Report) -> Iterator[tuple[int, Entry]]:
    """Every entry with the number of its method."""
    for mark, entries in enumerate(report.groups.values()):
        for entry in entries:
            yield mark, entry


def _place(report: Report, entry: Entry, *, as_made: bool = False) -> _Place | None:
    results = entry.as_made if as_made else entry.results
    x, y = results.get(report.keeps), results.get(report.headline)
    if x is None or y is None or x.value is None or y.value is None or not math.isfinite(x.value + y.value):
        return None
    intervals = [None if m.low is None or m.high is None else (m.low, m.high) for m in (x, y)]
    return _Place(x.value, y.value, *intervals)


def _stairs(points: Iterable[Point]) -> list[Point]:
    """The front of keeping more (x) and leaking less (y), from left to right."""
    front: list[Point] = []
    for x, y in sorted(set(points), key=lambda p: (-p[0], p[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    front.reverse()
    return [*front[:1], *(p for (x, _), (x2, y2) in pairwise(front) for p in ((x, y2), (x2, y2)))]


def _whiskers(place: _Place) -> Iterator[list[Point]]:
    if place.x_interval:
        yield [(x, place.y) for x in place.x_interval]
    if place.y_interval:
        yield [(place.x, y) for y in place.y_interval]


def _finite(curve: Iterable[Point]) -> list[Point]:
    return sorted(point for point in curve if math.isfinite(point[0] + point[1]))


def _title(report: Report, entry: Entry) -> str:
    return next(label for label, other in report.labelled.items() if other is entry)


def _told(left: Kind, kept: Kind, place: _Place) -> str:
    return f"{words.shown(raw(left), place.y)} left, {words.shown(raw(kept), place.x)} kept"
