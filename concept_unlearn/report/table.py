"""A report in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .costs import costs
from .grid import Row, columns, grid
from .reading import examples, lacking, line_of, told
from .report import Report


def render(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_lines(report)]
    if report.entries:
        parts.append(_methods(report))
    if cost := _costs(report):
        parts.append(cost)
    if picks := examples(report):
        parts.append(_examples(report, picks))
    return Group(*(part for i, part in enumerate(parts) for part in (["", part] if i else [part])))


def _lines(report: Report) -> Table:
    title = f"{report.benchmark}: {report.model}"
    if report.entries:
        title = f"{report.benchmark}: unlearned from {report.model} by {next(iter(report.labelled))}"
    table = _table(title, "")
    has_after, has_retrained = bool(report.entries), report.retrained is not None
    heads = ["before", *(["after"] if has_after else []), "95 % interval"]
    for name in (*heads, *(["retrained"] if has_retrained else []), *(["gap"] if has_after and has_retrained else [])):
        table.add_column(name, justify="right", style="dim" if name == "95 % interval" else "", no_wrap=True)
    table.add_column("wanted", style="dim")
    section = None
    for row in told(report):
        if row.line.section != section:
            section = row.line.section
            table.add_section()
            table.add_row(_plain(section, style="bold"))
        cells = [row.before.text, *([row.after.text] if has_after else []), row.after.interval]
        cells += [row.retrained.text] if row.retrained else []
        cells += [row.gap] if has_after and has_retrained else []
        table.add_row(Padding(_plain(row.line.label), (0, 0, 0, 2)), *cells, _plain(row.line.wanted))
    return table


@dataclass(frozen=True)
class _Wide:
    """A table in as many pieces beneath one another as the width asks for, each with the first column."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Text]]
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        widths = [max(cell_len(head), *(row[i].cell_len for row in self.rows)) + 3 for i, head in enumerate(self.heads)]
        pieces: list[list[int]] = [[]]
        for i in range(1, len(self.heads)):
            if pieces[-1] and widths[0] - 3 + sum(widths[j] for j in (*pieces[-1], i)) > options.max_width:
                pieces.append([])
            pieces[-1].append(i)
        for number, piece in enumerate(pieces):
            if number:
                yield ""
            table = _table("" if number else self.title, self.heads[0])
            for i in piece:
                table.add_column(_plain(self.heads[i]), justify="right", no_wrap=True)
            for row in self.rows:
                table.add_row(row[0], *(row[i] for i in piece))
            yield table
        yield from (_plain(note, style="dim") for note in self.notes)


def _methods(report: Report) -> _Wide:
    rows = grid(report)
    is_attacked = any(row.worst.beside for row in rows)
    heads = ["", *(str(line.column or line.label) for line in columns(report)), "strength"]
    heads += ["worst case"] if is_attacked else []
    heads += ["gap"] if report.retrained else []
    found = []
    for row in rows:
        cells = [row.label, *(cell.text for cell in row.cells), row.strength.text]
        cells += [f"{row.worst.text} {row.worst.beside}".strip()] if is_attacked else []
        cells += [row.gap.value] if report.retrained else []
        name, *others = (_plain(cell, style=_style(row)) for cell in cells)
        found.append([Text("  " if row.role in ("as made", "seed") else "").append_text(name), *others])
    label = line_of(report, report.headline).label
    notes = [f"worst case: {label}, after the attack that gets most"] if is_attacked else []
    notes += [f"gap: {label}, less the retrained model's"] if report.retrained else []
    notes += lacking(report)
    return _Wide(methods_title(report), heads, found, notes)


def methods_title(report: Report) -> str:
    calibrated = any(entry.curve for entry in report.entries)
    return "Methods at equal retained utility, as made beneath" if calibrated else "Methods"


def _costs(report: Report) -> _Wide | None:
    found = costs(report)
    if found is None:
        return None
    rows = [[_plain(label), *map(_plain, cells)] for label, cells in found.rows.items()]
    return _Wide("Cost", ["", *found.heads], rows)


def _examples(report: Report, picks: Sequence[tuple[str, int]]) -> Table:
    table = _table("Before and after" if report.entries else "Replies", "prompt", expand=True)
    table.columns[0].ratio = 3
    table.add_column("before", ratio=4)
    if report.entries:
        table.add_column("after", ratio=4)
    for name, i in picks:
        replies = [report.base.said[name][i], *([report.main.said[name][i]] if report.entries else [])]
        table.add_row(_plain(report.questions[name][i].prompt), *map(_plain, replies))
        table.add_section()
    return table


def _table(title: str, first: str, *, expand: bool = False) -> Table:
    table = Table(
        title=_plain(title, style="bold") if title else None, title_justify="left", box=SIMPLE_HEAD, show_edge=False,
        pad_edge=False, expand=expand,
    )  # fmt: skip
    table.add_column(first)
    return table


def _style(row: Row) -> str:
    if row.role == "method":
        return "bold"
    return "" if row.role in ("base", "retrained") else "dim"


def _plain(text: str, *, style: str = "") -> Text:
    """On one line, and no str, in which rich would take brackets for markup; nor may a reply steer the terminal."""
    return Text("".join(c if c.isprintable() else "�" for c in " ".join(text.split())), style=style)
