"""An attack: what can still be got out of a model that was made to forget.

It takes a victim and yields another patched model or other prompts; what leaks then is measured as the benchmark does.
An attack gets the model as it runs, never the patch's insides, unless its ``access`` says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ...component import Component, Frozen
from ...data.examples import Probe
from ...data.scope import Scope
from ...lm import LM
from ...patches import Patch
from ...tracking import Progress
from ..benchmark import Benchmark
from ..measured import Measured
from ..metric import Metric
from ..view import Asked

Access = Literal["prompts", "activations", "weights"]


@dataclass(frozen=True)
class Victim:
    """A model that was made to forget, and how it is told whether it did."""

    lm: LM
    patch: Patch | None
    """None: the model as it is, such as the untouched one, whose leaks are the ceiling."""
    benchmark: Benchmark
    scope: Scope
    """What was to be forgotten: where relearning and in-context examples come from."""
    folder: Path | None = None
    """Long work goes on from here."""
    progress: Progress | None = None

    @property
    def leaks(self) -> tuple[Metric, ...]:
        return self.benchmark.leaks


class Outcome(Frozen):
    """What leaked under an attack."""

    results: dict[str, Measured] = {}
    """By the name of the leak."""
    curve: tuple[tuple[float, float], ...] = ()
    """(steps or other effort, headline leak), where there are several."""
    skipped: str | None = None
    """Why it could not be tried; there are no results then."""


class Attack(Component, family=True):
    """``attack(victim)`` -> Outcome."""

    access: ClassVar[Access]
    """What the attacker needs of the model."""

    @abstractmethod
    def __call__(self, victim: Victim) -> Outcome: ...


class _OtherModel(Attack):
    """The same questions to a model that was tampered with."""

    @abstractmethod
    def tampered(self, victim: Victim) -> Patch:
        """The victim's patch and what the attacker did to the model, as one patch."""

    def __call__(self, victim: Victim) -> Outcome:
        benchmark, leaks = victim.benchmark, victim.leaks
        view = benchmark.observe(victim.lm, self.tampered(victim), metrics=leaks, progress=victim.progress)
        return Outcome(results=benchmark.measure(view, leaks))


class _OtherPrompts(Attack):
    """The same model asked otherwise."""

    access: ClassVar[Access] = "prompts"

    @abstractmethod
    def reworded(self, probes: Sequence[Probe], victim: Victim) -> Sequence[Probe]:
        """For each probe the one that is asked in its place."""

    def __call__(self, victim: Victim) -> Outcome:
        benchmark, leaks = victim.benchmark, victim.leaks
        sets = self.asked(victim)
        view = benchmark.observe(victim.lm, victim.patch, metrics=leaks, sets=sets, progress=victim.progress)
        return Outcome(results=benchmark.measure(view, leaks))

    def asked(self, victim: Victim) -> Mapping[str, Asked]:
        """The benchmark's sets that leaks are read off, reworded."""
        raise NotImplementedError


def worst(outcomes: Mapping[str, Outcome], clean: Mapping[str, Measured], leak: str) -> tuple[str, float] | None:
    """The attack that leaks most and how much; "clean" where none beats asking plainly. None if nothing is defined."""
    found = {"clean": clean[leak].value} if leak in clean else {}
    found |= {name: o.results[leak].value for name, o in outcomes.items() if leak in o.results}
    known = {name: value for name, value in found.items() if value is not None}
    return max(known.items(), key=lambda pair: pair[1]) if known else None
