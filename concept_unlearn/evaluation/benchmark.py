"""A benchmark: sets of examples, the metrics that are read off them, and how its results are told."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..component import Component, Frozen
from ..data.scope import Scope
from ..errors import InvalidConfig
from ..lm import LM
from ..patches import Patch
from ..tracking import Progress
from .measured import Measured
from .metric import Metric
from .observe import observe
from .view import Asked, Read, View

Kind = Literal["percent", "number", "factor"]
"""How a value is shown: a share, a number, or for a patch as a multiple of the untouched model's."""


class Line(Frozen):
    """One metric in the words of somebody who meets it for the first time."""

    section: str
    label: str
    metric: str
    kind: Kind = "percent"
    wanted: str = ""
    """low, high, as before, 0, ..."""
    column: str | None = None
    """Its short name among the columns of a table of methods; none where it is not one of them."""

    @classmethod
    def of(
        cls, section: str, label: str, metric: str, wanted: str = "", column: str | None = None, kind: Kind = "percent"
    ) -> Line:
        return cls(section=section, label=label, metric=metric, wanted=wanted, column=column, kind=kind)


class Benchmark(Component, family=True):
    """What is asked of a model and what is read off its answers; the same for every model, patched or not."""

    batch_size: int = Field(32, gt=0)
    """Rows that go through the model at a time; changes memory and speed, never a result."""

    @property
    def name(self) -> str:
        """Of the benchmark and what it is about, for titles."""
        return self.kind

    @cached_property
    @abstractmethod
    def sets(self) -> Mapping[str, Asked]:
        """What is asked. Raises InvalidData, which names the file and line, or EmptyData."""

    @cached_property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    @abstractmethod
    def lines(self) -> tuple[Line, ...]:
        """What its table shows, in order; those without a metric of this benchmark's are passed over."""

    @property
    @abstractmethod
    def leaks(self) -> tuple[Metric, ...]:
        """What an attack tries to raise: higher where more was left. The first is the headline."""

    @property
    @abstractmethod
    def keeps(self) -> Metric:
        """What calibration keeps: higher where more was kept."""

    @property
    def request(self) -> Scope | None:
        """What was asked to be forgotten and kept, where the benchmark holds it: methods and attacks learn from it."""
        return None

    @cached_property
    def digest(self) -> str:
        """Changes with everything that is asked."""
        asked = {name: asdict(asked) for name, asked in self.sets.items()}
        text = json.dumps(asked, default=lambda e: e.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fitted(self, sets: Mapping[str, Asked], lm: LM) -> Mapping[str, Asked]:
        """The sets as this model can be asked them. Raises InvalidData where it cannot."""
        return sets

    def observe(
        self,
        lm: LM,
        patch: Patch | None = None,
        *,
        metrics: Sequence[Metric] | None = None,
        sets: Mapping[str, Asked] | None = None,
        judge: LM | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> View:
        """Everything that ``metrics`` (all of the benchmark's) read, each once, with the patch on.

        ``sets`` are asked in place of the benchmark's own of the same names.
        ``judge`` says how plausible the replies are; the model without its patch where None. With a ``folder`` records
        are kept as they come, and an observation that was stopped goes on to the same.
        """
        reads = reads_of(self.metrics if metrics is None else metrics)
        return observe(
            lm, self.fitted({**self.sets, **(sets or {})}, lm), reads, patch=patch, judge=judge,
            batch_size=self.batch_size, folder=folder, progress=progress,
        )  # fmt: skip

    def measure(self, view: View, metrics: Sequence[Metric] | None = None) -> dict[str, Measured]:
        """By name, every metric of a view."""
        return {m.name: m(view) for m in (self.metrics if metrics is None else metrics)}

    def metric(self, name: str) -> Metric:
        """By its name; without a set, that of the set which the benchmark keeps. Raises UnknownName."""
        from ..errors import UnknownName

        found = {m.name: m for m in self.metrics}
        full = name if "/" in name else f"{self.keeps.on}/{name}"
        if full not in found:
            raise UnknownName(f"metric of {self.name}", full, found)
        return found[full]

    def n_steps(self, metrics: Sequence[Metric] | None = None) -> int:
        """How often ``progress`` will have been told of one more."""
        reads = reads_of(self.metrics if metrics is None else metrics)
        return sum(len(self.sets[name].examples) * passes(wanted) for name, wanted in reads.items())


def passes(reads: frozenset[Read]) -> int:
    """How many times an example is put to a model for these."""
    scored = bool(reads & {"answers", "paraphrases", "distractors", "moments"})
    return scored + sum(read in reads for read in ("said", "surprise", "gradnorm"))


def reads_of(metrics: Sequence[Metric]) -> dict[str, frozenset[Read]]:
    """What these metrics read, by set."""
    found: dict[str, set[Read]] = {}
    names = [m.name for m in metrics]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InvalidConfig(f"two metrics are called {twice[0]!r}: give one of them a label")
    for metric in metrics:
        for name, reads in metric.reads.items():
            found.setdefault(name, set()).update(reads)
            if "surprise" in reads:
                found[name].add("said")
            if "moments" in reads:
                found[name].add("answers")
    return {name: frozenset(reads) for name, reads in found.items()}
