"""The largest strength at which a patch still keeps what it must (UWC, arXiv 2406.09179, section 4).

Methods are compared at the same retained utility, so every patch is first set to the strength that just
keeps it. The utility of a strength need not fall steadily, so it is tried on a grid from the top down and
refined only next to the first strength that keeps it; plain bisection would miss it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .data.scope import Scope
from .errors import EmptyData, InvalidConfig
from .evaluation.concept import perplexity_ratio, read_texts
from .evaluation.probes import answered
from .lm import LM
from .patches import Patch

Progress = Callable[[int], None]

_CANARIES = 6
"""Forget passages among which the patch's canary is looked for."""


class Calibration(NamedTuple):
    """The largest strength that keeps enough, and how it was found."""

    strength: float
    target: float
    achieved: float
    """Utility at that strength."""
    curve: tuple[tuple[float, float], ...]
    """Every (strength, utility) that was tried, in order of strength."""


@dataclass(frozen=True)
class RetainedUtility:
    """How much of what must be kept a strength keeps: 1 or more means all that was asked.

    The smaller of (share of the base's accuracy on neighbouring probes / keep) and (max_perplexity / growth of
    perplexity on general text). Without neighbouring probes, general ones serve.
    """

    lm: LM
    patch: Patch
    scope: Scope
    keep: float = 0.98
    max_perplexity: float = 1.01
    max_probes: int | None = None
    max_passages: int = 24
    max_tokens: int = 96
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InvalidConfig(f"keep is a share of the base's accuracy, above 0 and at most 1; given: {self.keep}")
        if self.max_perplexity < 1:
            raise InvalidConfig(f"max_perplexity is a ratio to the base's, at least 1; given: {self.max_perplexity}")
        if not self._probes:
            raise EmptyData(f"scope {self.scope.name!r} has no out_near or out_far probe to keep")
        base_right = self._right()
        if not base_right:
            raise EmptyData("the base model answers no retained probe correctly: there is nothing to keep")
        object.__setattr__(self, "_base", (base_right, self._texts()))

    def __call__(self, strength: float) -> float:
        right_base, texts_base = self._base  # type: ignore[attr-defined]
        with self.patch.at(strength).on(self.lm):
            texts, right = self._texts(), self._right()
        return float(min(right / right_base / self.keep, self.max_perplexity / perplexity_ratio(texts_base, texts)))

    @property
    def _probes(self) -> Any:
        return (self.scope.out_near or self.scope.out_far)[: self.max_probes]

    def _right(self) -> int:
        return sum(answered(self.lm, self._probes, progress=self.progress))

    def _texts(self) -> Any:
        return read_texts(self.lm, self.scope.retain[: self.max_passages], self.max_tokens, progress=self.progress)


def calibrate(
    lm: LM,
    patch: Patch,
    scope: Scope,
    *,
    keep: float = 0.98,
    max_perplexity: float = 1.01,
    grid: int = 21,
    tolerance: float = 0.005,
    progress: Progress | None = None,
) -> Patch:
    """The patch at the largest strength up to 1 that keeps the share ``keep`` of the neighbouring probes' accuracy
    and general perplexity within ``max_perplexity`` times the base's, with its origin. ``find_strength`` says more.
    """
    found = find_strength(
        RetainedUtility(lm, patch, scope, keep, max_perplexity, progress=progress),
        grid=grid,
        tolerance=tolerance,
    )
    if found.strength == 0:
        warnings.warn(
            f"no strength of this patch keeps what was asked: best reachable is off; tried {found.curve}", stacklevel=2
        )
    return patch.at(found.strength).met(lm, [p.text for p in scope.forget[:_CANARIES]])


def find_strength(
    utility: Callable[[float], float], *, target: float = 1.0, grid: int = 21, tolerance: float = 0.005
) -> Calibration:
    """The largest strength in [0, 1] with utility of at least ``target``, to within ``tolerance``.

    ``grid`` strengths are tried from the top until one is feasible; between it and the next above it the
    border is bisected, its lower end kept feasible. Strength 0 is off and always counts as feasible.
    """
    if grid < 2:
        raise InvalidConfig(f"a grid has at least 2 strengths, 0 and 1; given: {grid}")
    curve: dict[float, float] = {}

    def feasible(strength: float) -> bool:
        curve[strength] = utility(strength)
        return curve[strength] >= target

    strengths = [i / (grid - 1) for i in range(grid - 1, 0, -1)]
    low = next((s for s in strengths if feasible(s)), 0.0)
    high = min((s for s in strengths if s > low), default=1.0)
    while low < 1 and high - low > tolerance:
        middle = (low + high) / 2
        if feasible(middle):
            low = middle
        else:
            high = middle
    achieved = curve.get(low)
    return Calibration(low, target, utility(low) if achieved is None else achieved, tuple(sorted(curve.items())))
