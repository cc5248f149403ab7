"""Documents to harvest, in a fixed order that can be read again: from memory, from files, from the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import EmptyData, InvalidData
from .encode import encode_texts
from .examples import read_jsonl

FILES = (".txt", ".jsonl", ".parquet")
_TOKENISED_AT_ONCE = 256


class Corpus:
    """Iterate it for its documents: each time the same, in the same order."""

    def __init__(self, name: str, documents: Callable[[], Iterable[str]], fingerprint: Callable[[], str]) -> None:
        self.name, self._documents, self._fingerprint = name, documents, fingerprint

    def __iter__(self) -> Iterator[str]:
        found = False
        for document in self._documents():
            found = True
            yield document
        if not found:
            raise EmptyData(f"corpus {self.name!r} has no document")

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the documents: a hash of the texts or files, or what names a dataset of the Hub."""
        return self._fingerprint()

    @classmethod
    def of(cls, texts: Sequence[str], *, name: str = "texts") -> Corpus:
        return cls(name, lambda: texts, lambda: _hash(text.encode() for text in texts))

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        field: str = "text",
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
    ) -> Corpus:
        """Files (``.txt``, a document each; ``.jsonl`` and ``.parquet``, a document a row), folders of them, or a
        dataset of the Hub, streamed.

        ``field`` names the text; ``split``, ``subset`` and ``revision`` are the dataset's. Raises InvalidData.
        """
        sources = [source] if isinstance(source, str | Path) else list(source)
        paths = [Path(s).expanduser() for s in sources]
        missing = len(sources) == 1 and not paths[0].exists() and paths[0].suffix not in FILES
        if missing and str(sources[0]).count("/") == 1:
            return cls._from_hub(str(sources[0]), field, split, subset, revision)
        files = [file for path in paths for file in _files(path)]
        return cls(
            ", ".join(path.name for path in paths),
            lambda: (text for file in files for text in _read(file, field)),
            lambda: _hash([field.encode(), *(_digest(file) for file in files)]),
        )

    @classmethod
    def _from_hub(cls, dataset: str, field: str, split: str, subset: str | None, revision: str | None) -> Corpus:
        from datasets import load_dataset

        def documents() -> Iterator[str]:
            try:
                rows: Any = load_dataset(dataset, subset, split=split, revision=revision, streaming=True)
            except Exception as error:  # the Hub client raises many kinds; each becomes one of ours
                raise InvalidData(f"no dataset {dataset!r} on the Hub or in its cache: {error}") from error
            for number, row in enumerate(rows):
                yield _text(row, field, f"{dataset}, row {number}")

        named = [dataset, subset or "", split, revision or "", field]
        return cls(dataset, documents, lambda: _hash(part.encode() for part in named))


def sequences(corpus: Corpus, tokenizer: Any, *, context: int) -> Iterator[list[int]]:
    """The corpus as token ids. A document longer than ``context`` becomes several sequences, each with the BOS that
    the tokenizer opens a text with; a sequence of a single token, which no model can be asked about, is left out.
    """
    documents = iter(corpus)
    while group := list(islice(documents, _TOKENISED_AT_ONCE)):
        for ids in encode_texts(tokenizer, group):
            opens = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
            rest, room = ids[len(opens) :], context - len(opens)
            for start in range(0, len(rest), room):
                piece = opens + rest[start : start + room]
                if len(piece) > 1:
                    yield piece


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InvalidData(f"no file, folder or dataset {path}: a corpus is {', '.join(FILES)}, a folder, or a Hub id")
    found = sorted(p for p in path.rglob("*") if p.suffix in FILES) if path.is_dir() else [path]
    if not found or found[0].suffix not in FILES:
        raise InvalidData(f"{path} holds no text to harvest; known kinds of file: {', '.join(FILES)}")
    return found


def _read(path: Path, field: str) -> Iterator[str]:
    match path.suffix:
        case ".txt":
            yield path.read_text(encoding="utf-8")
        case ".jsonl":
            for number, record in read_jsonl(path):
                yield record if isinstance(record, str) else _text(record, field, f"{path}, line {number}")
        case ".parquet":
            from datasets import load_dataset

            rows: Any = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            for number, row in enumerate(rows):
                yield _text(row, field, f"{path}, row {number}")


def _text(row: Any, field: str, where: str) -> str:
    found = row.get(field) if isinstance(row, dict) else None
    if not isinstance(found, str):
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InvalidData(f"{where}: no text in field {field!r}; it has: {known}")
    return found


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return path.suffix.encode() + hashlib.file_digest(file, "sha256").digest()
