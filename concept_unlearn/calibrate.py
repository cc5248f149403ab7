"""The largest strength at which a patch still keeps what it must (UWC, arXiv 2406.09179, section 4).

Methods are compared at the same retained utility, so every patch is first set to the strength that just
keeps it. The utility of a strength need not fall steadily, so it is tried on a grid from the top down and
refined only next to the first strength that keeps it; plain bisection would miss it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .data.scope import IN_SCOPE, Scope
from .errors import EmptyData, InvalidConfig
from .evaluation.concept import TextRow, perplexity_ratio, read_texts
from .evaluation.fluency import is_gibberish, surprises
from .evaluation.probes import Reply, replies
from .lm import LM
from .patches import Patch
from .tracking import Progress

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


class RetainedUtility:
    """How much of what must be kept a patch keeps: 1 or more means all that was asked.

    The smallest of (max_perplexity / growth of perplexity on general text), (share of fluent replies in scope / the
    least that is allowed) and (share of the base's accuracy on neighbouring probes / keep). Without neighbouring
    probes, general ones serve. The base is observed once, when this is made, for any number of patches. A patch that
    fails one is not asked the next: below 1 the value is an upper bound.
    """

    def __init__(
        self,
        lm: LM,
        scope: Scope,
        *,
        keep: float = 0.98,
        max_perplexity: float = 1.01,
        max_gibberish: float = 0.05,
        max_probes: int | None = None,
        max_passages: int = 24,
        max_tokens: int = 96,
        progress: Progress | None = None,
    ) -> None:
        """``max_gibberish`` is how much the share of gibberish among replies in scope may grow; ``max_probes`` of
        each kind are asked, and the first ``max_tokens`` of ``max_passages`` read.
        """
        if not 0 < keep <= 1:
            raise InvalidConfig(f"keep is a share of the base's accuracy, above 0 and at most 1; given: {keep}")
        if max_perplexity < 1:
            raise InvalidConfig(f"max_perplexity is a ratio to the base's, at least 1; given: {max_perplexity}")
        if max_gibberish < 0:
            raise InvalidConfig(f"max_gibberish is an added share of replies, at least 0; given: {max_gibberish}")
        self._lm, self._keep, self._max_perplexity, self._max_tokens = lm, keep, max_perplexity, max_tokens
        self._kept = (scope.out_near or scope.out_far)[:max_probes]
        self._asked = [probe for name in IN_SCOPE for probe in getattr(scope, name)[:max_probes]]
        self._passages = scope.retain[:max_passages]
        if not self._kept:
            raise EmptyData(f"scope {scope.name!r} has no out_near or out_far probe to keep")
        self.progress = progress
        self._base_texts, self._base_right = self._texts(), self._right()
        if not self._base_right:
            raise EmptyData("the base model answers no retained probe correctly: there is nothing to keep")
        self._least_fluent = self._fluent(self._asked_replies()) - max_gibberish

    def __call__(self, patch: Patch) -> float:
        with patch.on(self._lm):
            found = self._max_perplexity / perplexity_ratio(self._base_texts, self._texts())
            if found < 1:
                return found
            written = self._asked_replies()
        if self._least_fluent > 0:
            found = min(found, self._fluent(written) / self._least_fluent)
        if found < 1:
            return found
        with patch.on(self._lm):
            return min(found, self._right() / self._base_right / self._keep)

    def _right(self) -> int:
        return sum(reply.right for reply in replies(self._lm, self._kept, progress=self.progress))

    def _texts(self) -> Sequence[TextRow]:
        return read_texts(self._lm, self._passages, self._max_tokens, progress=self.progress)

    def _asked_replies(self) -> list[Reply]:
        return replies(self._lm, self._asked, progress=self.progress)

    def _fluent(self, written: Sequence[Reply]) -> float:
        """Share of replies that are no gibberish to the untouched model; 0 if nothing was asked."""
        surprise = surprises(self._lm, [reply.prompt for reply in written], [reply.ids for reply in written])
        fluent = [not is_gibberish(reply.ids, s) for reply, s in zip(written, surprise, strict=True)]
        return sum(fluent) / max(len(fluent), 1)


def calibrate(
    lm: LM,
    patch: Patch,
    scope: Scope,
    *,
    keep: float = 0.98,
    max_perplexity: float = 1.01,
    max_gibberish: float = 0.05,
    grid: int = 21,
    tolerance: float = 0.005,
    progress: Progress | None = None,
) -> Patch:
    """The patch, with its origin, at the largest strength up to 1 that keeps the share ``keep`` of the neighbouring
    probes' accuracy, general perplexity within ``max_perplexity`` times the base's, and replies in scope fluent but
    for ``max_gibberish`` more of them than the base's. ``find_strength`` says more.
    """
    utility = RetainedUtility(
        lm, scope, keep=keep, max_perplexity=max_perplexity, max_gibberish=max_gibberish, progress=progress
    )
    found = find_strength(lambda strength: utility(patch.at(strength)), grid=grid, tolerance=tolerance)
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
