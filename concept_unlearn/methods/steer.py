"""Unlearn along a direction that needs no dictionary: the comparators that belong beside every SAE edit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..edits import Edit, Zero
from ..features import difference_of_means, leace
from ..gates import Always, Gate
from ..lm import Site
from ..patches import FeaturePatch
from .base import Method, Study


class Steer(Method):
    """A difference of means or LEACE at one site or several, as a dictionary of one feature.

    ``zero`` ablates (for LEACE: erases); ``shift`` with ``by: -2`` subtracts twice the difference of means.
    """

    sites: tuple[Site, ...] = Field(min_length=1)
    direction: Literal["difference_of_means", "leace"] = "difference_of_means"
    edit: Edit = Zero()
    gate: Gate = Always()

    def fit(self, study: Study) -> FeaturePatch:
        study.measure(sites=self.sites)
        fitter = difference_of_means if self.direction == "difference_of_means" else leace
        slices = [fitter(study.moments(site)) for site in sorted(self.sites)]
        gate, sensor = study.gate(self.gate, slices[0])
        return FeaturePatch(slices=tuple(slices), edit=self.edit, gate=gate, sensor=sensor)

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        return (), self.sites
