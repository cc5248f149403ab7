"""A plane with two axes, drawn as SVG in the colours and letters of the page around it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple

from ..evaluation.benchmark import Kind
from . import words
from .drawing import COLOURS, Drawing

WIDTH, HEIGHT = 440.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM, _INSET = 48.0, 12.0, 30.0, 44.0, 12.0
_TICKS, _NEAR = 5, 9.0
_APART = (40.0, 13.0)
"""Of two names, across and down."""
INK = "currentColor"

Point = tuple[float, float]
Shape = Literal["dot", "ring", "square", "diamond"]


def colour(mark: int) -> str:
    """Of a method; a page may give it another shade as ``--s0``, ``--s1``, ..."""
    i = mark % len(COLOURS)
    return f"var(--s{i}, {COLOURS[i]})"


class Axis(NamedTuple):
    label: str
    kind: Kind
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """From 0 at the first tick to 1 at the last."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def axis(label: str, kind: Kind, values: Iterable[float]) -> Axis:
    """Round ticks, the first below and the last above all values; a share that stands alone has a scale from 0 to 1."""
    known = list(values)
    low, high = min(known), max(known)
    if low == high and kind == "percent" and 0 <= low <= 1:
        low, high = 0.0, 1.0
    span = (high - low) or abs(high) or 1.0
    rough = span / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(label, kind, tuple(i * step for i in range(first, max(last, first + 1) + 1)))


class Plane:
    """Marks are put in the units of the axes; names of marks that lie on one another are joined."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self._marks: list[str] = []
        self._names: list[tuple[Point, str]] = []

    def line(
        self, points: Sequence[Point], colour: str, *, width: float = 1.5, dash: str = "", opacity: float = 1
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._pixel, points))
        style = (
            f"fill:none;stroke:{colour};stroke-width:{width:g};stroke-dasharray:{dash or 'none'};opacity:{opacity:g}"
        )
        self._marks.append(f'<polyline points="{path}" style="{style}"/>')

    def mark(self, point: Point, shape: Shape, colour: str, title: str, *, name: str = "", size: float = 5) -> None:
        x, y = self._pixel(point)
        fill = "var(--paper, #fff)" if shape == "ring" else colour
        style = f"fill:{fill};stroke:{colour};stroke-width:2"
        self._marks.append(f'<g style="{style}"><title>{escape(title)}</title>{_shape(shape, x, y, size)}</g>')
        if name:
            self._names.append(((x, y), name))

    def across(self, value: float) -> None:
        """A dashed line at a height that others are compared with."""
        self.line([(self.x.ticks[0], value), (self.x.ticks[-1], value)], INK, width=1, dash="4 4", opacity=0.5)

    def drawn(self, title: str) -> Drawing:
        head = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}"'
        letters = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
        parts = [*self._axes(), *self._marks, *self._labels()]
        return Drawing(f'{head} xmlns="http://www.w3.org/2000/svg" {letters}>{"".join(parts)}</svg>')

    def _axes(self) -> Iterable[str]:
        left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM
        for tick in self.x.ticks:
            x, _ = self._pixel((tick, self.y.ticks[0]))
            yield _rule(x, top, x, bottom) + _text(x, bottom + 16, _tick(self.x, tick), "middle")
        for tick in self.y.ticks:
            _, y = self._pixel((self.x.ticks[0], tick))
            yield _rule(left, y, right, y) + _text(left - 6, y + 4, _tick(self.y, tick), "end")
        yield _text(right, HEIGHT - 8, f"{self.x.label} →", "end", quiet=True)
        yield _text(4, 16, f"↑ {self.y.label}", "start", quiet=True)

    def _labels(self) -> Iterable[str]:
        groups: list[tuple[Point, list[str]]] = []
        for (x, y), name in self._names:
            near = (names for (a, b), names in groups if math.hypot(a - x, b - y) < _NEAR)
            if (names := next(near, None)) is None:
                groups.append(((x, y), [name]))
            elif name not in names:
                names.append(name)
        placed: list[Point] = []
        for (x, y), names in sorted(groups):
            is_right, y = x > WIDTH * 0.75, y - 6
            while any(abs(x - a) < _APART[0] and abs(y - b) < _APART[1] for a, b in placed):
                y += 1
            placed.append((x, y))
            yield _text(x - 9 if is_right else x + 9, y, ", ".join(names), "end" if is_right else "start", bold=True)

    def _pixel(self, point: Point) -> Point:
        width, height = WIDTH - _LEFT - _RIGHT - 2 * _INSET, HEIGHT - _TOP - _BOTTOM - 2 * _INSET
        return _LEFT + _INSET + width * self.x.at(point[0]), _TOP + _INSET + height * (1 - self.y.at(point[1]))


def _shape(shape: Shape, x: float, y: float, size: float) -> str:
    if shape in ("dot", "ring"):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:g}" height="{2 * size:g}"{turn}/>'


def _rule(x: float, y: float, x2: float, y2: float) -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{x2:.1f} {y2:.1f}" style="stroke:currentColor;opacity:.13"/>'


def _text(x: float, y: float, text: str, anchor: str, *, quiet: bool = False, bold: bool = False) -> str:
    look = ' opacity=".75"' if quiet else ' font-weight="600" class="name"' if bold else ' opacity=".75" font-size="11"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def _tick(axis: Axis, value: float) -> str:
    if axis.kind == "percent":
        return words.shown("percent", value)
    step = axis.ticks[1] - axis.ticks[0]
    digits = max(3, 1 + math.floor(math.log10(max(map(abs, axis.ticks)) / step)) + 1)
    return f"{value:.{digits}g}"
