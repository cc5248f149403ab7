"""What was observed, on disk as it comes: a line a batch, so that whatever was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..activations.processes import Processes
from ..errors import InvalidConfig
from ..files import write_atomically
from .view import SCORED, Reply, Tokens

Found = dict["Key", dict[str, Any]]


class Key(NamedTuple):
    set: str
    at: int
    """Which of its examples."""


class Records:
    """``add`` what a batch found, ``found`` says all of it. Several processes write a part each, and ``gather`` shares.

    A folder that holds the records of another observation is refused. Without a folder all stays in memory.
    """

    def __init__(self, folder: Path | None, what: Mapping[str, Any], here: Processes) -> None:
        self.folder, self._here = folder, here
        self.found: Found = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(what)))
        for path in (self._whole, *sorted(folder.glob("part-*.jsonl"))):
            if path.is_file():
                self._read(path)
        here.wait()  # nobody writes before all have read

    def have(self, fields: Mapping[Key, Sequence[str]]) -> bool:
        return all(set(names) <= set(self.found.get(key, ())) for key, names in fields.items())

    def add(self, found: Found) -> None:
        for key, fields in found.items():
            self.found.setdefault(key, {}).update(fields)
        if self.folder is not None:
            with self._part.open("a", encoding="utf-8") as file:
                file.write("\n" + _line(found))  # behind a line that was cut off, if there is one
                file.flush()

    def gather(self) -> None:
        """What every process found is known to all, and on disk in the order of the examples."""
        if self._here.world > 1:
            from torch import distributed

            parts: list[Any] = [None] * self._here.world
            distributed.all_gather_object(parts, {k: _dump(v) for k, v in self.found.items()})
            for part in parts:
                for key, fields in part.items():
                    self.found.setdefault(key, {}).update(_load(fields))
        if self.folder is not None:
            if self._here.rank == 0:
                lines = (_line({key: self.found[key]}) for key in sorted(self.found))
                write_atomically(self._whole, "".join(lines).encode())
                for part in self.folder.glob("part-*.jsonl"):  # also of processes that there are no more
                    part.unlink()
            self._here.wait()

    @property
    def _whole(self) -> Path:
        assert self.folder is not None
        return self.folder / "records.jsonl"

    @property
    def _part(self) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{self._here.rank}.jsonl"

    def _claim(self, what: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / "observation.json"
        if not path.is_file():
            if self._here.rank == 0:
                write_atomically(path, json.dumps(what, indent=1).encode())
            return
        other = json.loads(path.read_text())
        for name, value in what.items():
            if other.get(name) != value:
                raise InvalidConfig(
                    f"{self.folder} holds an observation with another {name} ({other.get(name)!r}; asked for is "
                    f"{value!r}): use another folder, or delete it"
                )

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):  # not splitlines: a reply may hold any separator that there is
            try:
                rows = json.loads(line)
            except ValueError:  # the line that was being written when the process died, maybe within a character
                continue
            for name, at, fields in rows:
                self.found.setdefault(Key(name, at), {}).update(_load(fields))


def _line(found: Found) -> str:
    return json.dumps([[key.set, key.at, _dump(fields)] for key, fields in found.items()], ensure_ascii=False) + "\n"


def _dump(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [t.as_json() for t in value] if name in SCORED else list(value) if name == "said" else value
        for name, value in sorted(fields.items())
    }


def _load(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(fields)
    for name in found.keys() & set(SCORED):
        found[name] = tuple(Tokens.of_json(t) for t in found[name])
    if "said" in found:
        ids, text = found["said"]
        found["said"] = Reply(tuple(ids), text)
    return found
