"""What was observed of a model and of every way to make it forget; everything shown is made of this alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import from_json, to_json
from rich.console import RenderableType

from ..component import Frozen
from ..errors import CorruptArtifact, InvalidConfig, InvalidData
from ..evaluation.attacks.base import Outcome
from ..evaluation.benchmark import Line
from ..evaluation.cost import Cost
from ..evaluation.measured import Measured
from ..files import write_atomically
from .drawing import Drawing


def _json(data: Any, indent: int | None = None) -> bytes:
    """JSON has no infinity: it is written as a string."""
    return to_json(data, indent=indent, inf_nan_mode="strings", fallback=str)


Plain = Annotated[dict[str, Any], BeforeValidator(lambda data: from_json(_json(data)))]
"""What JSON can hold, so that it is the same when it was saved and loaded."""


class Question(Frozen):
    """One example, as it was put to every model."""

    prompt: str
    answers: tuple[str, ...]
    """Any of them is right; of a passage, its text."""
    chat: bool = False


class Entry(Frozen):
    """One model of a report."""

    name: str
    about: str = ""
    """One line on what it is."""
    seed: int | None = None
    strength: float = 1.0
    curve: tuple[tuple[float, float], ...] = ()
    """(strength, retained utility) as calibration tried them; empty if it did not."""
    results: dict[str, Measured]
    """By metric, at this strength."""
    as_made: dict[str, Measured] = Field(default_factory=dict)
    """At strength 1, where calibration lowered it."""
    attacks: dict[str, Outcome] = Field(default_factory=dict)
    """By attack, at this strength."""
    cost: Cost | None = None
    said: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By set, the replies to its questions."""


class Report(Frozen):
    """The first entry is what the report is about; the others stand beside it."""

    model: str
    fingerprint: str = ""
    """Of the model's weights; reports of different ones do not merge."""
    benchmark: str
    spec: Plain = Field(default_factory=dict)
    """From which the benchmark can be made again."""
    digest: str
    """Of everything that was asked."""
    lines: tuple[Line, ...]
    leaks: tuple[str, ...]
    """Metrics that attacks try to raise; the first is the headline."""
    keeps: str
    """The metric that calibration keeps."""
    questions: dict[str, tuple[Question, ...]]
    """By set."""
    base: Entry
    """The untouched model; what leaks of it under attack is the ceiling."""
    retrained: Entry | None = None
    """A model that never saw what was to be forgotten."""
    entries: tuple[Entry, ...] = ()
    """Entries of one name are the same method made with different seeds."""
    missing: dict[str, str] = Field(default_factory=dict)
    """Methods that were asked for and could not be made or measured, with the reason."""
    provenance: Plain = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_no_twins(self) -> Self:
        for (name, seed), n in Counter((e.name, e.seed) for e in self.entries).items():
            if n > 1:
                raise InvalidConfig(f"{n} entries are called {name!r} and have seed {seed}: give them other names")
        return self

    @property
    def main(self) -> Entry:
        """The untouched model where nothing else was observed."""
        return self.entries[0] if self.entries else self.base

    @property
    def headline(self) -> str:
        """The metric that says how much is left."""
        return self.leaks[0]

    @property
    def groups(self) -> dict[str, tuple[Entry, ...]]:
        """Entries by name: the seeds of one method together."""
        return {name: tuple(e for e in self.entries if e.name == name) for name in dict.fromkeys(self._names)}

    @property
    def labelled(self) -> dict[str, Entry]:
        """Entries by a name that no other has."""
        often = Counter(self._names)
        return {e.name if often[e.name] == 1 else f"{e.name}, seed {e.seed}": e for e in self.entries}

    @property
    def _names(self) -> list[str]:
        return [e.name for e in self.entries]

    def as_json(self) -> dict[str, Any]:
        """Numbers and notes without the examples, as plain data; ``metrics`` are those of the first entry."""
        from .summary import summary

        return summary(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One an example: what every model made of it."""
        from .summary import rows

        return rows(self)

    def table(self) -> RenderableType:
        """For a terminal."""
        from .table import render

        return render(self)

    def html(self) -> str:
        from .html import render

        return render(self)

    def picture(self) -> Drawing | None:
        """What is forgotten against what is kept, for a README. None where no method has both numbers."""
        from .picture import picture

        return picture(self)

    def markdown(self) -> str:
        """The table of methods, for a paper."""
        from .markdown import render

        return render(self)

    def save(self, folder: str | Path) -> Path:
        """``report.html``, ``table.md``, ``summary.json``, ``rows.jsonl``, and ``report.json`` that holds it all; and
        ``tradeoff.svg`` where some method was measured.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "rows.jsonl", b"".join(_json(row) + b"\n" for row in self.rows()))
        write_atomically(folder / "summary.json", _json(self.as_json(), indent=1))
        write_atomically(folder / "table.md", self.markdown().encode())
        write_atomically(folder / "report.html", self.html().encode())
        if drawing := self.picture():
            write_atomically(folder / "tradeoff.svg", drawing.encode())
        write_atomically(folder / "report.json", _json(self))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """What ``save`` put into a folder. Raises InvalidData where there is none, CorruptArtifact for a broken one."""
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise InvalidData(f"{folder} holds no report: there is no {path.name} in it")
        try:
            return cls.model_validate_json(path.read_bytes())
        except (ValidationError, InvalidConfig) as error:
            raise CorruptArtifact(f"{path} is no report of this version: {str(error).splitlines()[0]}") from None

    @classmethod
    def merged(cls, reports: Mapping[str, Report]) -> Report:
        """Reports by the name of their run as one. Raises InvalidConfig where they ask something else or another model.

        The untouched and the retrained model are those of the first report that has them. Entries of one name and
        different seeds stay together; those of one seed get their run's name in front.
        """
        from .merge import merged

        return merged(reports)
