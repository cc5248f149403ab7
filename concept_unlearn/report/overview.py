"""The same methods in several settings: of each what is left, what is kept, and what the worst attack brings back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..errors import InvalidConfig
from ..files import write_atomically
from . import words
from .grid import grid
from .markdown import escaped, table
from .reading import lacking, line_of
from .report import Report

_HEADS = ("left", "kept", "worst")
_ROLES = ("base", "retrained", "method")


@dataclass(frozen=True)
class Overview:
    """Reports by the name of their setting."""

    reports: Mapping[str, Report]

    def __post_init__(self) -> None:
        if not self.reports:
            raise InvalidConfig("an overview is of at least one report")

    @cached_property
    def rows(self) -> dict[str, tuple[str, ...]]:
        """By method, ``_HEADS`` of each setting; a method that a setting does not have has dashes there."""
        cells = {name: _cells(report) for name, report in self.reports.items()}
        methods = dict.fromkeys(method for own in cells.values() for method in own)
        nothing = (words.NONE,) * len(_HEADS)
        return {method: tuple(c for own in cells.values() for c in own.get(method, nothing)) for method in methods}

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        for name, report in self.reports.items():
            left, kept = (line_of(report, metric).label for metric in (report.headline, report.keeps))
            found.append(f"{name}: left is {left}, kept is {kept}; worst is what is left under the worst attack")
            found += [f"{name}: {one}" for one in lacking(report)]
        return tuple(found)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title="Every method in every setting", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for name in self.reports:
            for head in _HEADS:
                table.add_column(Text(f"{name}\n{head}"), justify="right")
        for method, cells in self.rows.items():
            table.add_row(Text(method), *map(Text, cells))
        return table

    def markdown(self) -> str:
        heads = ["method", *(f"{name}: {head}" for name in self.reports for head in _HEADS)]
        rows = [[escaped(cell) for cell in (method, *cells)] for method, cells in self.rows.items()]
        notes = "".join(f"{escaped(note)}.  \n" for note in self.notes)
        return f"{table([escaped(head) for head in heads], rows)}\n{notes}"

    def save(self, folder: str | Path) -> Path:
        """``overview.md`` in the folder, whose path is returned."""
        path = Path(folder) / "overview.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.markdown().encode())
        return path


def _cells(report: Report) -> dict[str, tuple[str, ...]]:
    lines = [line_of(report, metric) for metric in (report.headline, report.keeps)]
    names = list(report.groups)
    rows = {row.name if row.mark is None else names[row.mark]: row for row in grid(report, lines) if row.role in _ROLES}
    return {name: (*(cell.text for cell in row.cells), row.worst.text) for name, row in rows.items()}
