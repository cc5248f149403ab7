"""A metric: a pure function of what one model made of a benchmark."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from ..component import Component
from .measured import Measured, mean_of
from .view import Read, Seen, View

Beside = Literal["original", "retrained"]


class Metric(Component, family=True):
    """``metric(view)`` -> Measured. It reads what ``reads`` names and nothing else."""

    on: str = "forget"
    """The set that it is about."""
    label: str | None = None
    """What it is called in tables and records, after its set; its kind where not given."""

    lower_is_better: ClassVar[bool] = False
    """True of what nobody wants more of, whatever is to be kept: perplexity, gibberish."""

    @property
    def name(self) -> str:
        return f"{self.on}/{self.label or self.kind}"

    @property
    def beside(self) -> tuple[Beside, ...]:
        """The other models it compares with; undefined where one of them was not observed."""
        return ()

    @property
    @abstractmethod
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        """What must have been observed, by set."""

    @abstractmethod
    def __call__(self, view: View) -> Measured: ...


class _ItemMetric(Metric):
    """The mean over the items of one set of a value each."""

    needs: ClassVar[tuple[Read, ...]]

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return {self.on: self.needs}

    @abstractmethod
    def value(self, seen: Seen, i: int) -> float | None:
        """Of one item; None where it is undefined."""

    def __call__(self, view: View) -> Measured:
        seen = view[self.on]
        return mean_of([self.value(seen, i) for i in range(len(seen.examples))])
