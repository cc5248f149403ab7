"""The largest strength at which a patch still keeps what it must (UWC, arXiv 2406.09179, section 4).

Methods are compared at the same retained utility, so every patch is first set to the strength that just
keeps it. The utility of a strength need not fall steadily, so it is tried on a grid from the top down and
refined only next to the first strength that keeps it; plain bisection would miss it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

from .data.scope import IN_SCOPE, Scope
from .errors import EmptyData, InvalidConfig
from .evaluation.benchmark import Benchmark, reads_of
from .evaluation.benchmarks.concept import CHAT_TOKENS, CLOZE_TOKENS
from .evaluation.measured import Measured
from .evaluation.metric import Metric
from .evaluation.metrics import GeneratedAccuracy, Gibberish, Perplexity
from .evaluation.observe import observe
from .evaluation.view import Asked
from .lm import LM
from .patches import Patch
from .tracking import Progress


class Calibration(NamedTuple):
    """The largest strength that keeps enough, and how it was found."""

    strength: float
    target: float
    achieved: float
    """Utility at that strength."""
    curve: tuple[tuple[float, float], ...]
    """Every (strength, utility) that was tried, in order of strength."""


class Utility(Protocol):
    """How much of what must be kept a patch keeps: 1 or more means all that was asked."""

    def __call__(self, patch: Patch) -> float: ...


class RetainedMetric:
    """One metric of a benchmark, as a multiple of the least that is asked: ``keep`` times the untouched model's value,
    or ``target`` itself (UWC: extraction strength on retained data, keep 0.95).

    The untouched model is observed once, when this is made, for any number of patches.
    """

    def __init__(
        self,
        lm: LM,
        benchmark: Benchmark,
        *,
        metric: str | Metric | None = None,
        keep: float = 0.95,
        target: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``metric``, higher where more is kept, is what the benchmark itself ``keeps`` where None.

        Raises InvalidConfig for a target above what the untouched model reaches, EmptyData if that is nothing.
        """
        _check_share(keep)
        self._lm, self._benchmark, self.progress = lm, benchmark, progress
        self.metric = benchmark.keeps if metric is None else metric
        if isinstance(self.metric, str):
            self.metric = benchmark.metric(self.metric)
        if self.metric.lower_is_better:
            raise InvalidConfig(f"{self.metric.name} is higher where less is kept: calibrate on another metric")
        base = self._value(None)
        if base is None or base <= 0:
            raise EmptyData(f"{self.metric.name} of the untouched model is {base}: there is nothing to keep")
        if target is not None and target > base:
            raise InvalidConfig(
                f"no strength reaches {self.metric.name} = {target:g}: the best reachable is {base:.4g}, with the "
                "patch off"
            )
        self.least = keep * base if target is None else target

    def __call__(self, patch: Patch) -> float:
        return (self._value(patch) or 0.0) / self.least

    def _value(self, patch: Patch | None) -> float | None:
        assert not isinstance(self.metric, str)
        view = self._benchmark.observe(self._lm, patch, metrics=[self.metric], progress=self.progress)
        return self.metric(view).value


class RetainedUtility:
    """Of a scope, the smallest of (max_perplexity / growth of perplexity on general text), (share of fluent replies in
    scope / the least that is allowed) and (share of the base's accuracy on neighbouring probes / keep).

    Without neighbouring probes, general ones serve. The base is observed once, when this is made, for any number of
    patches. A patch that fails the first is not asked the others: below 1 the value is an upper bound.
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
        _check_share(keep)
        if max_perplexity < 1:
            raise InvalidConfig(f"max_perplexity is a ratio to the base's, at least 1; given: {max_perplexity}")
        if max_gibberish < 0:
            raise InvalidConfig(f"max_gibberish is an added share of replies, at least 0; given: {max_gibberish}")
        self._lm, self._keep, self._max_perplexity, self.progress = lm, keep, max_perplexity, progress
        kept = (scope.out_near or scope.out_far)[:max_probes]
        asked = tuple(probe for name in IN_SCOPE for probe in getattr(scope, name)[:max_probes])
        if not kept:
            raise EmptyData(f"scope {scope.name!r} has no out_near or out_far probe to keep")
        self._sets = {
            "general": Asked(scope.retain[:max_passages], max_tokens=max_tokens),
            "asked": Asked(asked, CHAT_TOKENS, max_cloze_tokens=CLOZE_TOKENS),
            "kept": Asked(kept, CHAT_TOKENS, max_cloze_tokens=CLOZE_TOKENS),
        }
        self._written: tuple[Metric, ...] = (
            GeneratedAccuracy(on="kept"), *((Gibberish(on="asked", sets=("asked",)),) if asked else ())
        )  # fmt: skip
        self._base = self._measured(None, Perplexity(on="general"), *self._written)
        if not self._base["kept/generated_accuracy"].value:
            name = "out_near" if scope.out_near else "out_far"
            raise EmptyData(
                f"the base model answers no retained probe correctly, of {len(kept)} in {name} of scope "
                f"{scope.name!r}: there is nothing to keep; add some that it answers"
            )
        self._least_fluent = self._fluent(self._base) - max_gibberish

    def __call__(self, patch: Patch) -> float:
        growth = _ratio(self._measured(patch, Perplexity(on="general")), self._base, "general/perplexity")
        found = self._max_perplexity / growth if growth > 0 else 0.0
        if not found >= 1:
            return found
        written = self._measured(patch, *self._written)
        if self._least_fluent > 0:
            found = min(found, self._fluent(written) / self._least_fluent)
        return min(found, _ratio(written, self._base, "kept/generated_accuracy") / self._keep)

    def _measured(self, patch: Patch | None, *metrics: Metric) -> dict[str, Measured]:
        view = observe(self._lm, self._sets, reads_of(metrics), patch=patch, progress=self.progress)
        return {metric.name: metric(view) for metric in metrics}

    @staticmethod
    def _fluent(found: dict[str, Measured]) -> float:
        """Share of replies in scope that are no gibberish; 0 if nothing was asked."""
        gibberish = found["asked/gibberish"].value if "asked/gibberish" in found else None
        return 0.0 if gibberish is None else 1 - gibberish


def calibrate(
    lm: LM,
    patch: Patch,
    scope: Scope | Benchmark,
    *,
    keep: float | None = None,
    metric: str | Metric | None = None,
    max_perplexity: float = 1.01,
    max_gibberish: float = 0.05,
    grid: int = 21,
    tolerance: float = 0.005,
    progress: Progress | None = None,
) -> Patch:
    """The patch, with its origin, at the largest strength up to 1 that keeps enough. ``find_strength`` says more.

    Of a scope: the share ``keep`` (0.98) of the neighbouring probes' accuracy, general perplexity within
    ``max_perplexity`` times the base's, and replies in scope fluent but for ``max_gibberish`` more of them than the
    base's. Of a benchmark: the share ``keep`` (0.95) of ``metric``, by default the one it ``keeps``.
    """
    utility: Utility
    if isinstance(scope, Scope):
        if metric is not None:
            raise InvalidConfig("metric= goes with a benchmark; a scope is kept by its probes and passages")
        utility = RetainedUtility(
            lm, scope, keep=0.98 if keep is None else keep, max_perplexity=max_perplexity,
            max_gibberish=max_gibberish, progress=progress,
        )  # fmt: skip
        texts = [p.text for p in scope.forget]
    else:
        utility = RetainedMetric(lm, scope, metric=metric, keep=0.95 if keep is None else keep, progress=progress)
        texts = [p.text for p in scope.request.forget] if scope.request else []
    found = strongest(utility, patch, grid=grid, tolerance=tolerance)
    return patch.at(found.strength).met(lm, texts)


def strongest(
    utility: Utility, patch: Patch, *, name: str = "this patch", grid: int = 21, tolerance: float = 0.005
) -> Calibration:
    """``find_strength`` of a patch, with a warning that calls it by its ``name`` where nothing but off keeps enough."""
    found = find_strength(lambda strength: utility(patch.at(strength)), grid=grid, tolerance=tolerance)
    if found.strength == 0:
        best = max((value, strength) for strength, value in found.curve if strength > 0)
        warnings.warn(
            f"no strength of {name} keeps what was asked, so it is off: the best reachable is {best[0]:.3g} of it, "
            f"at strength {best[1]:.3g}",
            stacklevel=3,
        )
    return found


def find_strength(
    utility: Callable[[float], float], *, target: float = 1.0, grid: int = 21, tolerance: float = 0.005
) -> Calibration:
    """The largest strength in [0, 1] with utility of at least ``target``, to within ``tolerance``.

    ``grid`` strengths are tried from the top until one is feasible; between it and the next above it the
    border is bisected, its lower end kept feasible. Strength 0 is off and always counts as feasible.
    """
    if grid < 2:
        raise InvalidConfig(f"a grid has at least 2 strengths, 0 and 1; given: {grid}")
    if not tolerance > 0:
        raise InvalidConfig(f"tolerance is a width of strengths, above 0; given: {tolerance}")
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


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise InvalidConfig(f"keep is a share of the base's, above 0 and at most 1; given: {keep}")


def _ratio(after: dict[str, Measured], before: dict[str, Measured], name: str) -> float:
    a, b = after[name].value, before[name].value
    return float("inf") if a is None or not b else a / b
