"""What is forgotten against what is kept as one SVG that stands alone: on its own paper, dark where the reader's is."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from . import plots
from .drawing import COLOURS, DARK, INK, PAPER, Drawing
from .plane import HEIGHT, WIDTH, colour
from .report import Report

_EDGE, _LINE, _HEAD, _CHARACTERS = 12.0, 19.0, 44.0, 27
"""Of the paper's margin, a line of the legend and the title; of a name, the characters for which a column has room."""


def picture(report: Report) -> Drawing | None:
    """The tradeoff under a title, above the names of the methods. None where no method has both numbers."""
    drawing = plots.tradeoff(report)
    if drawing is None:
        return None
    names = list(report.groups)
    rows = (len(names) + 1) // 2
    width, height = WIDTH + 2 * _EDGE, _HEAD + HEIGHT + rows * _LINE + 2 * _EDGE
    title = f"{report.benchmark}, unlearned from {report.model.rpartition('/')[2]}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
    letters = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
    inner = drawing.replace("<svg ", f'<svg x="{_EDGE:g}" y="{_HEAD:g}" width="{WIDTH:g}" height="{HEIGHT:g}" ', 1)
    return Drawing(
        f'{head} width="{width:g}" height="{height:g}" aria-label="{escape(title)}" {letters}>'
        f"<style>{_style()}</style>"
        f'<rect width="{width:g}" height="{height:g}" rx="8" style="fill:var(--paper)"/>'
        f'<text x="{_EDGE + 4:g}" y="26" font-size="14" font-weight="600">{escape(_cut(title, 60))}</text>'
        f"{inner}{''.join(_legend(names, rows))}</svg>\n"
    )


def _legend(names: list[str], rows: int) -> Iterator[str]:
    """Numbers as in the plot, two columns, from top to bottom."""
    for mark, name in enumerate(names):
        column, row = divmod(mark, rows)
        x, y = _EDGE + 12 + column * WIDTH / 2, _HEAD + HEIGHT + 12 + row * _LINE
        yield f'<circle cx="{x:g}" cy="{y:g}" r="8" style="fill:{colour(mark)}"/>'
        number = f'text-anchor="middle" font-size="10" font-weight="700" style="fill:var(--paper)">{mark + 1}'
        yield f'<text x="{x:g}" y="{y + 3.5:g}" {number}</text>'
        yield f'<text x="{x + 14:g}" y="{y + 4:g}">{escape(_cut(name, _CHARACTERS))}</text>'


def _style() -> str:
    light, dark = (
        f"color:{ink};--paper:{paper};" + "".join(f"--s{i}:{shade};" for i, shade in enumerate(shades))
        for ink, paper, shades in ((INK, PAPER, COLOURS), DARK)
    )
    outline = ".name{paint-order:stroke;stroke:var(--paper);stroke-width:3px}"
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{outline}"


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"
