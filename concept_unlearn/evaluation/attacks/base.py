"""An attack: what can still be got out of a model that was made to forget.

It takes a victim and tries ways in: another patched model, or other prompts. What leaks then is measured as the
benchmark does, and the worst is what counts. An attack gets the model as it runs, never the patch's insides, and leaves
both as they were.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from ...component import Component, Frozen
from ...data.examples import Probe
from ...data.scope import Scope
from ...errors import InvalidData
from ...lm import LM
from ...patches import Patch, Stack
from ...tracking import Progress
from ..benchmark import Benchmark
from ..measured import Measured
from ..metric import Metric
from ..question import encode_probe, encode_reply
from ..view import Asked

Access = Literal["prompts", "activations", "weights"]
Notes = Mapping[str, float | str | None]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Way(NamedTuple):
    """One way in: what is asked of which model."""

    patch: Patch | None
    sets: Mapping[str, Asked] = _NOTHING
    """Asked in place of the benchmark's own of the same names."""
    notes: Notes = _NOTHING
    """Which way it is, for the results."""
    effort: float | None = None
    """Steps, tokens, a layer: where the ways make a curve."""


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
    """Long work goes on from here: of this attack on this patch alone."""
    shared: Path | None = None
    """What does not depend on the patch is kept here for other victims: prompts that a model has rewritten."""
    progress: Progress | None = None

    @property
    def leaks(self) -> tuple[Metric, ...]:
        return self.benchmark.leaks

    def measure(self, way: Way, leaks: Sequence[Metric], part: str | None = None) -> dict[str, Measured]:
        """What leaks that way; ``part`` names the place of its records in the folder, without which none are kept."""
        folder = None if self.folder is None or part is None else self.folder / part
        view = self.benchmark.observe(
            self.lm, way.patch, metrics=leaks, sets=way.sets, folder=folder, progress=self.progress
        )
        found = self.benchmark.measure(view, leaks)
        return {name: Measured(**dict(m) | {"notes": {**m.notes, **way.notes}}) for name, m in found.items()}


class Outcome(Frozen):
    """What leaked under an attack."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    results: dict[str, Measured] = Field(default_factory=dict)
    """By the name of the leak; of several ways in, each leak of the one that leaks most, which is in its notes."""
    curve: tuple[tuple[float, float], ...] = ()
    """(steps or other effort, headline leak), where there are several."""
    skipped: str | None = None
    """Why it could not be tried; there are no results then."""


class Attack(Component, family=True):
    """``attack(victim)`` -> Outcome. Raises one of our errors where it cannot be tried."""

    access: ClassVar[Access]
    """What the attacker needs of the model."""

    @abstractmethod
    def __call__(self, victim: Victim) -> Outcome: ...


class _Ways(Attack):
    """Tries one way in after another."""

    def leaks(self, victim: Victim) -> tuple[Metric, ...]:
        return victim.leaks

    @abstractmethod
    def ways(self, victim: Victim) -> Iterable[Way]:
        """At least one, each made when the one before has been tried."""

    def __call__(self, victim: Victim) -> Outcome:
        leaks = self.leaks(victim)
        tried = [(way, victim.measure(way, leaks, f"way-{i}")) for i, way in enumerate(self.ways(victim))]
        headline = leaks[0].name
        curve = [(way.effort, found[headline].value) for way, found in tried]
        return Outcome(
            results=most([found for _, found in tried]),
            curve=tuple((x, y) for x, y in curve if x is not None and y is not None),
        )


class Rewording(NamedTuple):
    """One way of asking."""

    reword: Callable[[Sequence[Probe]], Sequence[Probe]]
    """For each probe of a set the one that is asked in its place."""
    notes: Notes = _NOTHING
    effort: float | None = None


class _OtherPrompts(_Ways):
    """The same model asked otherwise; ``reworded`` in the notes is how many probes are."""

    access: ClassVar[Access] = "prompts"

    @abstractmethod
    def rewordings(self, victim: Victim) -> Iterable[Rewording]: ...

    def leaks(self, victim: Victim) -> tuple[Metric, ...]:
        """Those that are read off probes alone. Raises InvalidData where there is none."""
        asked = {n for n, s in victim.benchmark.sets.items() if all(isinstance(e, Probe) for e in s.examples)}
        found = tuple(leak for leak in victim.leaks if asked >= set(leak.reads))
        if not found:
            raise InvalidData(
                f"what leaks is read off passages in {victim.benchmark.name}: there is no prompt to change"
            )
        return found

    def ways(self, victim: Victim) -> Iterable[Way]:
        own = victim.benchmark.sets
        names = dict.fromkeys(name for leak in self.leaks(victim) for name in leak.reads)
        rewordings, too_long = list(self.rewordings(victim)), []
        for rewording in rewordings:
            sets, n = {}, 0
            for name in names:
                probes = own[name].examples
                asked = tuple(rewording.reword([p for p in probes if isinstance(p, Probe)]))
                n += sum(a != b for a, b in zip(asked, probes, strict=True))
                sets[name] = replace(own[name], examples=asked)
            if (longest := max(_length(victim.lm, s) for s in sets.values())) <= victim.lm.context:
                yield Way(victim.patch, sets, {**rewording.notes, "reworded": n}, rewording.effort)
            else:
                too_long.append(longest)
        if len(too_long) == len(rewordings):
            raise InvalidData(
                f"reworded like this a prompt and its reply take {min(too_long)} tokens, and {victim.lm.name} reads "
                f"{victim.lm.context}"
            )


def _length(lm: LM, asked: Asked) -> int:
    """Tokens of the longest prompt with its reply or answer."""
    probes = [e for e in asked.examples if isinstance(e, Probe)]
    return max(
        (
            len(encode_probe(lm, p).prompt)
            + max(asked.reply_tokens(p), *(len(encode_reply(lm, p, a)) for a in p.answers))
            for p in probes
        ),
        default=0,
    )


def upon(patch: Patch | None, change: Patch) -> Patch:
    """What an attacker does to the model that runs under a patch, as one patch."""
    return change if patch is None else Stack((patch, change))


def most(tried: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """Of each leak the measurement that is highest, the first of equals; an undefined one only where all are."""

    def height(found: Measured) -> float:
        return float("-inf") if found.value is None else found.value

    return {name: max((found[name] for found in tried), key=height) for name in tried[0]}


def worst(outcomes: Mapping[str, Outcome], clean: Mapping[str, Measured], leak: str) -> tuple[str, float] | None:
    """The attack that leaks most and how much; "clean" where none beats asking plainly. None if nothing is defined."""
    found = {"clean": clean[leak].value} if leak in clean else {}
    found |= {name: o.results[leak].value for name, o in outcomes.items() if leak in o.results}
    known = {name: value for name, value in found.items() if value is not None}
    return max(known.items(), key=lambda pair: pair[1]) if known else None
