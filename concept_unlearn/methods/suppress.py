"""Unlearn by editing the features of a dictionary that belong to the concept. No gradient, fully reversible."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ..dictionaries import Dictionary
from ..edits import Clamp, Edit
from ..errors import InvalidConfig
from ..features import (
    AttributionScore,
    Choice,
    Score,
    SelectivityScore,
    Stats,
    attribute,
    matched_frequency,
    select,
)
from ..gates import Always, Gate
from ..lm import Site
from ..patches import FeaturePatch
from .base import Method, Study


class Suppress(Method):
    """Measure, select, edit: at one site or at several at once.

    The statistics, and the gate's threshold or probe, come from the scope that is given; the strength is left
    at 1, for ``calibrate`` to lower.
    """

    dictionaries: tuple[str, ...] = Field(min_length=1)
    """Names as ``load_dictionary`` takes them; each edits its own site."""
    score: Score = SelectivityScore()
    n: int = Field(10, gt=0)
    """Features of each dictionary."""
    edit: Edit = Clamp(to=-20.0)
    gate: Gate = Always()
    matched_control: bool = False
    """Edit unselective features that fire as often instead: what the selection is worth."""
    choices: tuple[Choice, ...] = ()
    """What was decided by hand, of a dictionary each: what is pinned or kept comes before what the score says, and what
    is dropped is left out.
    """
    refusal_features: tuple[int, ...] | None = None
    """For the ``refuse`` edit: the feature of each dictionary to raise."""

    def fit(self, study: Study) -> FeaturePatch:
        study.measure(self.dictionaries)
        self._check_choices([study.dictionary(name).name for name in self.dictionaries])
        slices, means = [], []
        for i, name in enumerate(self.dictionaries):
            dictionary, stats = study.dictionary(name), study.stats(name)
            if isinstance(self.score, AttributionScore) and stats.attribution is None:
                stats = attribute(study.lm, dictionary, study.scope, stats)
            features = self._chosen(dictionary, stats)
            if self.matched_control:
                features = matched_frequency(stats, features)
            features += self._refusal(i)
            slices.append(dictionary.slice(features))
            means.append(stats.retain.mean[list(features)])
        if len(means) > 1 and self.edit.fitted(means[0]) != self.edit:
            raise InvalidConfig(f"the {self.edit.kind} edit has values of its own for each feature: use one dictionary")
        gate, sensor = study.gate(self.gate, min(slices, key=lambda s: s.site))
        return FeaturePatch(slices=tuple(slices), edit=self.edit.fitted(means[0]), gate=gate, sensor=sensor)

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        return self.dictionaries, ()

    def _check_choices(self, known: Sequence[str]) -> None:
        for choice in self.choices:
            if choice.dictionary is None and len(known) > 1:
                raise InvalidConfig(f"a choice names its dictionary where there are several: {', '.join(known)}")
            if choice.dictionary not in (None, *known):
                raise InvalidConfig(f"a choice is of {choice.dictionary}, and what is edited is {', '.join(known)}")

    def _chosen(self, dictionary: Dictionary, stats: Stats) -> tuple[int, ...]:
        choice = next((c for c in self.choices if c.dictionary in (None, dictionary.name)), None)
        if choice is None:
            return select(stats, self.score, self.n)
        if choice.features:
            choice.of(dictionary)
        passing = int(self.score(stats).isfinite().sum())
        n = min(self.n + len(choice.features) + len(choice.drop), passing)
        return choice.over(select(stats, self.score, n) if n else (), self.n)

    def _refusal(self, i: int) -> tuple[int, ...]:
        if self.edit.kind != "refuse":
            return ()
        if self.refusal_features is None or len(self.refusal_features) != len(self.dictionaries):
            raise InvalidConfig("the refuse edit needs refusal_features, one for each dictionary")
        return (self.refusal_features[i],)
