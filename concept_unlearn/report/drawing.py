"""What all plots share: colours, axes, and the way from a figure to inline SVG."""

from __future__ import annotations

import io
from typing import Any

INK, QUIET, PAPER = "#1f2933", "#9aa5b1", "#ffffff"
COLOURS = ("#c2410c", "#0f766e", "#6d28d9", "#0369a1", "#a16207", "#be185d", "#4d7c0f", "#475569")
DARK = (
    "#e6e9ee",
    "#12161c",
    ("#fb923c", "#2dd4bf", "#a78bfa", "#38bdf8", "#facc15", "#f472b6", "#a3e635", "#94a3b8"),
)
"""Ink, paper and colours on a dark page, as ``report.css`` has them."""


class Drawing(str):
    """The text of an SVG, which a notebook shows as the picture it is."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes."""
    figure, axes = panels(width, height, 1, 1)
    return figure, axes[0, 0]


def panels(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and an array of axes: one x for all, one y a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    for own in axes.flat:
        own.spines[["top", "right"]].set_visible(False)
        own.tick_params(colors=INK)
        own.grid(alpha=0.2)
    return figure, axes


def drawn(figure: Any) -> Drawing:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return Drawing(text[text.index("<svg") :])
