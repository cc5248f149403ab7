"""How far a model's numbers are from another's: from the retrained model's, and before and after an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from ..measured import Measured, Table, compared, resampled, undefined
from ..metric import Beside, Metric
from ..view import Read, View
from .likelihood import Mean, truth_ratios

_MIN_REFERENCE = 1e-6
_MIN_POINTS = 3


class ForgetQuality(Metric):
    """p of a two-sided Kolmogorov-Smirnov test that truth ratios are distributed as the retrained model's (2401.06121).

    It has a floor at full separation, 1.9e-23 with 40 probes and 1.1e-239 with 400, where the statistic, in the notes,
    is the number to read. Undefined without a retrained model.
    """

    mean: Mean = "geometric"
    """Of ``TruthRatio``."""

    @property
    def beside(self) -> tuple[Beside, ...]:
        return ("retrained",)

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return {self.on: ("answers", "paraphrases", "distractors")}

    def __call__(self, view: View) -> Measured:
        n_total = len(view[self.on].examples)
        if view.retrained is None:
            return undefined("no observation of the retrained model", n_total)
        ours, theirs = (
            [r for r in truth_ratios(v[self.on], self.mean) if r is not None] for v in (view, view.retrained)
        )
        if not ours or not theirs:
            return undefined("no probe has a distractor", n_total)
        test = ks_2samp(ours, theirs)
        notes = {
            "log10_p": math.log10(test.pvalue) if test.pvalue > 0 else None,
            "statistic": float(test.statistic),
            "n_retrained": float(len(theirs)),
            "mean": self.mean,
        }
        return Measured(value=float(test.pvalue), n=len(ours), n_total=n_total, notes=notes)


class Gap(NamedTuple):
    """From the retrained model's value. Of a leak: above 0 is forgotten too little, below 0 too much."""

    signed: float | None
    low: float | None
    """Of the 95 % interval of ``signed``, as is ``high``; None where the two are not means over the same items."""
    high: float | None
    relative: float | None
    """In percent of the size of the retrained model's; None where that is below 1e-6."""


def retrain_gap(found: Measured, retrained: Measured) -> Gap:
    """How far a model's value is from the retrained model's, with its sign."""
    signed, low, high = compared(found, retrained, "difference")
    reference = retrained.value
    if signed is None or reference is None or abs(reference) < _MIN_REFERENCE:
        return Gap(signed, low, high, None)
    return Gap(signed, low, high, 100 * signed / abs(reference))


def normalised_improvement_drop(model: Measured, unlearned: Measured, without: Measured) -> Measured:
    """(s_model - s_unlearned) / (s_model - s_without), s_without with all codes removed (CodeUnlearn, 2410.10866).

    Undefined where the codes did not help.
    """
    scores = (model, unlearned, without)
    if any(s.value is None for s in scores):
        return undefined("a score is undefined", max(s.n_total for s in scores))

    def drop(values: Sequence[float]) -> float | None:
        whole, left, none = values
        return (whole - left) / (whole - none) if whole > none else None

    notes = {"model": model.value, "unlearned": unlearned.value, "without": without.value}
    if all(s.is_mean for s in scores) and len({len(s.values) for s in scores}) == 1:
        rows = list(zip(*(s.values for s in scores), strict=True))

        def statistic(tables: Mapping[str, Table]) -> float | None:
            return drop(tables["items"].mean(0).tolist()) if len(tables["items"]) else None

        found = resampled({"items": rows}, statistic, notes=notes)
    else:
        found = Measured(value=drop([s.value for s in scores if s.value is not None]), notes=notes)
    return found if found.value is not None else undefined("the codes did not help", found.n_total, notes=notes)


def robustness(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Pearson correlation of a metric before and after an attack, over models (UWC, 2406.09179).

    None of fewer than three models, or where all are alike.
    """
    known = [pair for pair in zip(before, after, strict=True) if None not in pair]
    if len(known) < _MIN_POINTS:
        return None
    columns = np.array(known, dtype=float).T
    return None if any(np.ptp(c) == 0 for c in columns) else float(np.corrcoef(columns)[0, 1])
