"""Activations on disk: one safetensors file a shard, each whole or not there.

``index.json`` says what was asked for, of which model and which corpus. ``00000.safetensors`` holds the rows of
each site in the order of the text, ``00000.json`` how many they are, the file's size and SHA-256, and whether it is the
last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors

from ..component import Frozen
from ..data.corpus import Corpus
from ..errors import CorruptArtifact, EmptyData, InvalidConfig
from ..files import write_atomically
from ..lm import LM
from ..tracking import Progress
from .processes import Processes
from .shards import Harvest, Shard, cut, read

FORMAT = 1


class Index(Frozen):
    """What a store holds. Two harvests with the same index give the same rows."""

    format: int = FORMAT
    model: str
    model_fingerprint: str
    model_dtype: str
    corpus: str
    corpus_fingerprint: str
    harvest: Harvest


class Entry(Frozen):
    """One shard."""

    rows: int
    size: int
    sha256: str
    last: bool


class Store:
    """A finished harvest, read shard by shard, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CorruptArtifact where shards are missing or truncated, naming them."""
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.entries = _entries(self.folder)
        bad = [i for i, entry in self.entries.items() if not _is_whole(self.folder, i, entry)]
        n_shards = next((i + 1 for i, entry in self.entries.items() if entry.last), None)
        missing = sorted({*bad, *(set(range(n_shards or 0)) - self.entries.keys())})
        if missing or n_shards is None:
            what = (
                f"shard {', '.join(map(str, missing))} missing or truncated" if missing else "the harvest is unfinished"
            )
            raise CorruptArtifact(f"{self.folder}: {what}; harvest into it again, what is whole is kept")
        self.n_shards = n_shards
        harvest = self.index.harvest
        self.sites, self.shard_tokens = tuple(sorted(harvest.sites)), harvest.shard_tokens
        self.model_name, self.model_fingerprint = self.index.model, self.index.model_fingerprint

    @property
    def key(self) -> str:
        return self.index.model_dump_json()

    @property
    def n_rows(self) -> int:
        """Of each site."""
        return sum(entry.rows for entry in self.entries.values())

    def shard(self, i: int) -> Shard:
        path = self.folder / f"{i:05d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return {site: file.get_tensor(str(site)) for site in self.sites}
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} cannot be read ({error}): delete it and harvest again") from error

    def shards(self, epoch: int, start: int, step: int) -> Iterator[Shard]:
        """Every ``step``-th from ``start`` on, in an order that each epoch draws anew."""
        order = torch.randperm(self.n_shards, generator=torch.Generator().manual_seed(epoch)).tolist()
        for i in order[start::step]:
            yield self.shard(i)


def harvest(
    lm: LM,
    corpus: Corpus,
    settings: Harvest,
    folder: str | Path,
    *,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Store:
    """Fill a store, or what is missing of it: shards that are whole by their checksum are kept.

    Several processes share the shards out among them; the rows are the same for any number of them. ``progress`` hears
    of rows. Raises InvalidConfig where the folder holds another harvest, EmptyData for a corpus without text.
    """
    folder, here = Path(folder), Processes.here()
    index = Index(
        model=lm.name, model_fingerprint=lm.fingerprint, model_dtype=str(lm.dtype).removeprefix("torch."),
        corpus=corpus.name, corpus_fingerprint=corpus.fingerprint, harvest=settings,
    )  # fmt: skip
    _claim(folder, index)
    entries = _entries(folder)
    for texts in cut(lm, corpus, settings):
        if texts.number % here.world != here.rank:
            continue
        entry = entries.get(texts.number)
        if entry and entry.last == texts.last and _is_whole(folder, texts.number, entry, checksum=True):
            if progress:
                progress(entry.rows)
            continue
        _write(
            folder, texts.number, read(lm, texts, settings, batch_tokens=batch_tokens, progress=progress), texts.last
        )
    here.wait()
    return Store(folder)


def _claim(folder: Path, index: Index) -> None:
    """Write the index, or check that the one that is there asks for the same."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").is_file():
        have, want = _read_index(folder).model_dump(mode="json"), index.model_dump(mode="json")
        if different := [key for key in _flat(want) if _flat(have)[key] != _flat(want)[key]]:
            key = different[0]
            raise InvalidConfig(
                f"{folder} holds another harvest: its {key} is {_flat(have)[key]}, asked for is {_flat(want)[key]}; "
                "use another folder"
            )
        return
    if any(folder.glob("*.safetensors")):
        raise InvalidConfig(f"{folder} holds other safetensors files and no index.json: use an empty folder")
    write_atomically(folder / "index.json", index.model_dump_json(indent=1).encode())


def _write(folder: Path, i: int, shard: Shard, last: bool) -> None:
    """The rows first, then the entry that vouches for them."""
    content = dump_tensors({str(site): x.contiguous() for site, x in shard.items()})
    rows = len(next(iter(shard.values())))
    write_atomically(folder / f"{i:05d}.safetensors", content)
    entry = Entry(rows=rows, size=len(content), sha256=hashlib.sha256(content).hexdigest(), last=last)
    write_atomically(folder / f"{i:05d}.json", entry.model_dump_json().encode())


def _is_whole(folder: Path, i: int, entry: Entry, *, checksum: bool = False) -> bool:
    path = folder / f"{i:05d}.safetensors"
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if not checksum:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


def _read_index(folder: Path) -> Index:
    path = folder / "index.json"
    if not path.is_file():
        raise EmptyData(
            f"{folder} is no store of activations: it has no index.json; fill it with concept-unlearn harvest"
        )
    try:
        return Index(**json.loads(path.read_text()))
    except (ValueError, TypeError, InvalidConfig) as error:
        raise CorruptArtifact(f"{path} is not the index of a store: {error}") from None


def _entries(folder: Path) -> dict[int, Entry]:
    """A shard whose entry cannot be read has none to vouch for it: it is missing."""
    found = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].json")):
        with contextlib.suppress(ValidationError):
            found[int(path.stem)] = Entry.model_validate_json(path.read_bytes())
    return found


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, **record.get("harvest", {})} | {"harvest": None}
