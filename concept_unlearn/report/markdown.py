"""The table of methods in Markdown, for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .costs import costs
from .grid import Cell, Row, columns, grid
from .reading import lacking, line_of
from .report import Report


def render(report: Report) -> str:
    rows = grid(report)
    is_attacked = any(row.worst.beside for row in rows)
    heads = ["method", *(line.column or line.label for line in columns(report)), "strength"]
    heads += [*(["worst case"] if is_attacked else []), *(["gap to retrained"] if report.retrained else [])]
    lines = []
    for row in rows:
        cells = [escaped(row.name), *map(_cell, row.cells), row.strength.text]
        cells += [_worst(row)] if is_attacked else []
        cells += [row.gap.value] if report.retrained else []
        lines.append(cells)
    text = f"{table([escaped(head) for head in heads], lines)}\n{_note(report, is_attacked)}\n"
    if found := costs(report):
        rows_of_cost = [[escaped(name), *map(escaped, cells)] for name, cells in found.rows.items()]
        text += f"\n{table(['cost', *found.heads], rows_of_cost)}"
    return text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells that are escaped, the first of each row to the left."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _note(report: Report, is_attacked: bool) -> str:
    label = escaped(line_of(report, report.headline).label)
    note = f"{escaped(report.benchmark)}, {escaped(report.model)}. Brackets: 95 % intervals."
    if any(len(group) > 1 for group in report.groups.values()):
        note += " Over seeds: mean ± standard deviation."
    if is_attacked:
        note += f" Worst case: {label}, under the attack that gets most."
    note += f" Gap to retrained: {label}, signed." if report.retrained else ""
    return "  \n".join([note, *(f"{escaped(one)}." for one in lacking(report))])


def _cell(cell: Cell) -> str:
    return f"{cell.text} [{cell.beside}]" if cell.beside else cell.text


def _worst(row: Row) -> str:
    return f"{row.worst.text} ({escaped(row.worst.beside)})" if row.worst.beside else row.worst.text


def escaped(text: str) -> str:
    """On one line, and nothing in it taken for a column, a tag or emphasis."""
    return re.sub(r"([\\|`*<\[\]])", r"\\\1", " ".join(text.split()))
