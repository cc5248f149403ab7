"""Finished reports in a folder of runs: pages that stand by themselves."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

_PAGES = {"report.html": "report", "inspection.html": "inspection"}
_DEPTH = 4
"""Folders below the shelf that are looked into."""


class Found(NamedTuple):
    name: str
    """Its folder, from the shelf."""
    kind: str
    """report or inspection."""
    address: str
    """Its path from the shelf, with slashes; nothing else is ever served."""
    when: datetime
    n_bytes: int


class Shelf:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def pages(self) -> list[Found]:
        """The newest first; none where the folder is not there."""
        found = []
        for depth in range(_DEPTH + 1):
            for page, kind in _PAGES.items():
                for path in self.folder.glob("*/" * depth + page):
                    inner, about = path.relative_to(self.folder), path.stat()
                    when = datetime.fromtimestamp(about.st_mtime)
                    name = inner.parent.as_posix() if depth else self.folder.resolve().name
                    found.append(Found(name, kind, inner.as_posix(), when, about.st_size))
        return sorted(found, key=lambda page: (page.when, page.address), reverse=True)

    def path(self, address: str) -> Path | None:
        """The file of a page that is listed; None for anything else, wherever it may lead."""
        return next((self.folder / page.address for page in self.pages() if page.address == address), None)
