"""Folders that are written to: caches and the place for scratch files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..lm.embedded import EMBEDDED, cache_dir
from .finding import Finding

_GIB = 2**30


class Place(NamedTuple):
    """A folder, what moves it elsewhere, and whether nothing works without it."""

    name: str
    path: Path
    variable: str
    needed: bool


def storage() -> Iterator[Finding]:
    """Whether each folder, or the one that it would be made in, can be written to, and what room is left."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    fetched = all((wheel.folder / "config.json").is_file() for wheel in EMBEDDED.values())
    datasets = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets")).expanduser()
    for place in (
        Place("embedded models", cache_dir(), "CONCEPT_UNLEARN_CACHE", needed=not fetched),
        Place("models of the Hub", Path(HF_HUB_CACHE), "HF_HOME", needed=False),
        Place("data sets of the Hub", datasets, "HF_HOME", needed=False),
        Place("scratch files", Path(tempfile.gettempdir()), "TMPDIR", needed=True),
    ):
        yield look(place)


def look(place: Place) -> Finding:
    """A file is written and removed; no folder is made."""
    base = next(folder for folder in (place.path, *place.path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=base) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(
            group="folders", name=place.name, state="broken" if place.needed else "note",
            found=f"{place.path} cannot be written to: {error.strerror}",
            mend=f"export {place.variable}=FOLDER, one that you may write to",
        )  # fmt: skip
    free = shutil.disk_usage(base).free
    tight = free < _GIB
    return Finding(
        group="folders", name=place.name, state="note" if tight else "ok",
        found=f"{place.path}, {free / _GIB:.1f} GiB free",
        mend=f"free some space, or export {place.variable}=FOLDER on another disk" if tight else "",
    )  # fmt: skip
