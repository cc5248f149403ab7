"""What of a patch can be turned on the page, and the patch as it is turned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from pydantic import Field

from ..component import Frozen
from ..gates import Gate, SequenceGate
from ..patches import Patch, PrefixPatch, Stack
from ..patches.activation import ActivationPatch
from ..patches.base import parts
from .muted import Named, without


class Knobs(Frozen):
    """How the knobs of a patch stand."""

    strength: float
    above: Mapping[int, float] = Field(default_factory=dict)
    """Thresholds of gates, by the number of the part whose gate it is; the others as made."""
    off: frozenset[Named] = frozenset()
    """Features that are switched off, in every part that has them."""

    def turned(self, patch: Patch) -> Patch:
        """The parts of a stack are numbered in the order of ``patches.watch.parts``."""
        found = _turned(patch, self, count())
        return Stack(()) if found is None else found.at(self.strength)

    def left(self, patch: Patch) -> tuple[int, ...]:
        """The parts that the turned patch still has, by their numbers in ``patch``."""
        return tuple(i for i, part in enumerate(parts(patch)) if without(part, self.off) is not None)


class Span(NamedTuple):
    """Where a slider begins and ends, and how far one step of it is."""

    low: float
    high: float
    step: float


def strength_span(patch: Patch) -> Span:
    """To twice as made, and at least to twice the patch's own."""
    return Span(0.0, max(2.0, round(2 * patch.strength, 1)), 0.01)


def threshold_span(gate: Gate) -> Span | None:
    """None for a gate that has no threshold."""
    above: float | None = getattr(gate, "above", None)
    if above is None:
        return None
    if isinstance(gate, SequenceGate):
        return Span(0.0, 1.0, 0.005)
    reach = max(4 * abs(above), 10.0)
    return Span(0.0 if _counts(gate) else above - reach, above + reach, reach / 400)


def gate_of(part: Patch) -> Gate | None:
    return part.gate if isinstance(part, ActivationPatch | PrefixPatch) else None


def is_gated(part: Patch) -> bool:
    gate = gate_of(part)
    return gate is not None and gate.kind != "always"


def in_words(part: Patch) -> str:
    """Of a part whose gate has no threshold: where it is at work."""
    gate = gate_of(part)
    if gate is None or (isinstance(part, PrefixPatch) and not is_gated(part)):
        return f"No gate: every text meets the changed {part.access}."
    if gate.kind == "always":
        return "No gate: at work on every token it has something to edit on."
    return f"A {gate.kind} gate, which has no threshold."


def _counts(gate: Gate) -> bool:
    """A threshold on what is never below zero, such as an activation or a count."""
    return gate.kind in ("token", "streaming")


def _turned(patch: Patch, knobs: Knobs, numbers: Iterator[int]) -> Patch | None:
    """None where nothing is left of it."""
    if isinstance(patch, Stack):
        inner = [_turned(part, knobs, numbers) for part in patch.patches]
        return replace(patch, patches=tuple(part for part in inner if part is not None))
    above = knobs.above.get(next(numbers))
    if above is not None and isinstance(patch, ActivationPatch | PrefixPatch):
        patch = replace(patch, gate=patch.gate.model_copy(update={"above": above}))
    return without(patch, knobs.off)
