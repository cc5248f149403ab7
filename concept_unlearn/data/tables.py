"""Rows of a named table, in a folder or on the Hub by the same call.

A table ``name`` is ``config`` or ``config/split``, as ``datasets.load_dataset(hub_id, config, split=split)`` knows it.
In a folder it is the first of these that is there, each with ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``:

    config            of ``config`` alone
    config/split      and its pieces ``config/split-00000-of-00002.parquet``, as a copy of a Hub repository has them

``.json`` is one array or JSON Lines; in a ``.csv`` a list stands as JSON in its cell. A row that is only a string is
``{"text": string}``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from ..errors import EmptyData, InvalidData
from .examples import Passage, Probe, read_jsonl, to_passage, to_probe

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_LISTED = 20

Source = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]
"""A folder, or a dataset id of the Hub."""


class Row(NamedTuple):
    """What a row lacks or holds amiss is InvalidData that says where it stands."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        found = self._field(name)
        if not isinstance(found, str) or not found.strip():
            raise InvalidData(f"{self.where}: {name!r} is text with at least one letter; given: {found!r}")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        found = self._field(name)
        if isinstance(found, str) and found.lstrip().startswith("["):
            found = _json(found, self.where)
        if not isinstance(found, list) or not found or not all(isinstance(t, str) and t.strip() for t in found):
            raise InvalidData(f"{self.where}: {name!r} is a list of texts, none of them empty; given: {found!r}")
        return tuple(found)

    def whole(self, name: str) -> int:
        found = self._field(name)
        if isinstance(found, str) and found.strip().isdecimal():
            return int(found)
        if not isinstance(found, int) or isinstance(found, bool):
            raise InvalidData(f"{self.where}: {name!r} is a whole number; given: {found!r}")
        return found

    def probe(self, **fields: Any) -> Probe:
        try:
            return to_probe(fields)
        except InvalidData as error:
            raise InvalidData(f"{self.where}: {error}") from None

    def passage(self, field: str = "text") -> Passage:
        return to_passage(self.text(field))

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise InvalidData(f"{self.where}: no {name!r}; it has: {', '.join(map(str, self.fields)) or 'nothing'}")
        return self.fields[name]


def read_table(data: str | Path, name: str, *, split: str = "train") -> list[Row]:
    """``read_table("locuslab/TOFU", "forget10")`` or the same of a folder. ``split`` is that of a ``name`` without one.

    Raises InvalidData, which names the file and line, or the files that were looked for and those that are there;
    EmptyData for a table without a row.
    """
    folder = Path(data).expanduser()
    config, _, named = name.partition("/")
    if folder.is_dir():
        stems = [name] if named else [config, f"{config}/{split}"]
        rows = (row for path in _files(folder, name, stems) for row in _of_file(path))
        return _some(rows, f"{folder}/{name}")
    if folder.exists():
        raise InvalidData(f"{folder} is a file; tables are looked for in a folder or on the Hub")
    if str(data).count("/") != 1:
        raise InvalidData(f"no folder {str(data)!r}, and a dataset of the Hub is called 'owner/name'")
    return _some(_of_hub(str(data), config, named or split), f"{data}, {name}")


def read_rows(path: str | Path) -> list[Row]:
    """All of one file. Raises InvalidData, which names the line, or EmptyData."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidData(f"no file {path}")
    if path.suffix not in SUFFIXES:
        raise InvalidData(f"{path}: rows are read from {', '.join(SUFFIXES)}")
    return _some(_of_file(path), str(path))


def _some(rows: Iterator[Row], where: str) -> list[Row]:
    found = list(rows)
    if not found:
        raise EmptyData(f"{where} has no row")
    return found


def _files(folder: Path, name: str, stems: Sequence[str]) -> list[Path]:
    for stem in stems:
        for suffix in SUFFIXES:
            whole = folder / f"{stem}{suffix}"
            pieces = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}"))
            if pieces:
                return pieces
    looked = ", ".join(f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in SUFFIXES)
    more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
    raise InvalidData(
        f"no table {name!r} in {folder}: looked for {looked}; it holds {', '.join(there[:_LISTED]) or 'no table'}{more}"
    )


def _of_hub(dataset: str, config: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(dataset, config, split=split)
    except Exception as error:  # the Hub client raises many kinds; each becomes one of ours
        raise InvalidData(f"no {config}/{split} of dataset {dataset!r} on the Hub or in its cache: {error}") from error
    for number, fields in enumerate(rows):
        yield _row(f"{dataset}, {config}/{split}, row {number}", fields)


def _of_file(path: Path) -> Iterator[Row]:
    match path.suffix:
        case ".jsonl":
            yield from _json_lines(path)
        case ".json":
            text = path.read_bytes()
            if not text.lstrip().startswith(b"["):
                yield from _json_lines(path)
                return
            for number, fields in enumerate(_json(text, str(path))):
                yield _row(f"{path}, row {number}", fields)
        case ".csv":
            yield from _csv(path)
        case ".parquet":
            yield from _parquet(path)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, fields in read_jsonl(path):
        yield _row(f"{path}, line {number}", fields)


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidData(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InvalidData(f"{where}: not UTF-8 ({error.reason})") from None


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for fields in reader:
                where = f"{path}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    raise InvalidData(f"{where}: it has not the {len(reader.fieldnames or ())} cells of the header")
                yield _row(where, fields)
        except csv.Error as error:
            raise InvalidData(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise InvalidData(f"{path}, after line {reader.reader.line_num}: not UTF-8 ({error.reason})") from None


def _parquet(path: Path) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = list(load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    except Exception as error:  # of pyarrow, as datasets wraps it
        raise InvalidData(f"{path}: not parquet ({error})") from None
    for number, fields in enumerate(rows):
        yield _row(f"{path}, row {number}", fields)


def _row(where: str, fields: Any) -> Row:
    if isinstance(fields, str):
        fields = {"text": fields}
    if not isinstance(fields, Mapping):
        raise InvalidData(f"{where}: a row is a mapping or a text; given: {fields!r:.80}")
    return Row(where, fields)
