"""A folder of long work: whose it is, what it logged, and one checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CorruptArtifact, InvalidConfig
from .files import save_tensors, write_atomically


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    notes: Any


class Journal:
    """``what`` holds everything that decides the outcome; a folder that holds other work is refused."""

    def __init__(self, folder: Path, what: Mapping[str, Any], *, name: str) -> None:
        self.folder, self._what, self._name = folder, json.loads(json.dumps(what)), name
        self.key = hashlib.sha256(json.dumps(self._what, sort_keys=True).encode()).hexdigest()[:16]
        self._path, self._log = folder / "checkpoint.safetensors", folder / "log.jsonl"

    @property
    def has_checkpoint(self) -> bool:
        return self._path.is_file()

    def claim(self) -> None:
        """Raises InvalidConfig, which names what differs, where the folder holds other work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{self._path.name}.*.tmp"):  # by a process that died while it saved
            left.unlink(missing_ok=True)
        path = self.folder / f"{self._name}.json"
        if not path.is_file():
            write_atomically(path, json.dumps({"key": self.key} | self._what, indent=1).encode())
            return
        other = json.loads(path.read_text())
        if other.get("key") != self.key:
            raise InvalidConfig(
                f"{self.folder} holds another {self._name} ({_difference(other, self._what)}): use another folder, or "
                "delete it"
            )

    def save(self, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Whole or not at all; the file before it stays until then."""
        save_tensors(self._path, tensors, {"key": self.key, "notes": json.dumps(notes)})

    def load(self, device: str = "cpu") -> Checkpoint | None:
        """Raises CorruptArtifact."""
        if not self.has_checkpoint:
            return None
        try:
            with safe_open(self._path, "pt", device=device) as file:
                notes = json.loads(file.metadata()["notes"])
                return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, notes)  # noqa: SIM118
        except SafetensorError as error:
            raise CorruptArtifact(f"{self._path} cannot be read ({error}): delete it to start anew") from None

    def finish(self) -> None:
        self._path.unlink(missing_ok=True)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def trim(self, step: int) -> None:
        """Lines of steps that are about to be taken again go."""
        if self._log.is_file():
            lines = [line for line in self._log.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(self._log, "".join(f"{line}\n" for line in lines).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # a line that was being written when the process died
        return float("inf")


def _difference(other: Any, mine: Any, path: str = "") -> str:
    for key, value in mine.items():
        theirs, at = other.get(key), f"{path}.{key}" if path else key
        if theirs == value:
            continue
        if isinstance(value, dict) and isinstance(theirs, dict):
            return _difference(theirs, value, at)
        return f"its {at} is {theirs}, asked for is {value}"
    return "its settings are others"
