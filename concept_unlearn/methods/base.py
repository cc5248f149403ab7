"""A method takes a model and a scope and leaves a patch. A study shares what several methods measure."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..component import Component
from ..data.scope import Scope
from ..dictionaries import Dictionary, Slice, load_dictionary
from ..features import Stats, measure_all
from ..features.gating import Fitted, fit_gate
from ..gates import Gate
from ..lm import LM, Site
from ..patches import Patch

Progress = Callable[[int], None]


class Study:
    """One model and one scope, and every measurement made of them, made once."""

    def __init__(self, lm: LM, scope: Scope, *, progress: Progress | None = None) -> None:
        self.lm, self.scope, self.progress = lm, scope, progress
        self._dictionaries: dict[str, Dictionary] = {}
        self._stats: dict[str, Stats] = {}
        self._gates: dict[Any, Fitted] = {}

    def dictionary(self, name: str) -> Dictionary:
        if name not in self._dictionaries:
            self._dictionaries[name] = load_dictionary(name, device=str(self.lm.device))
        return self._dictionaries[name]

    def measure(self, dictionaries: Iterable[str] = (), sites: Iterable[Site] = ()) -> None:
        """All that is not measured yet, in one pass over the model."""
        wanted: dict[str, Dictionary] = {name: self.dictionary(name) for name in dictionaries}
        covered = {d.site for d in wanted.values()} | {s.site for s in self._stats.values()}
        wanted |= {str(site): NoDictionary(site, self.lm.d_model) for site in sites if site not in covered}
        new = {name: d for name, d in wanted.items() if name not in self._stats}
        if new:
            found = measure_all(self.lm, list(new.values()), self.scope, progress=self.progress)
            self._stats |= dict(zip(new, found, strict=True))

    def stats(self, dictionary: str) -> Stats:
        self.measure([dictionary])
        return self._stats[dictionary]

    def moments(self, site: Site) -> Stats:
        """Statistics of the activation itself, from whichever dictionary was measured there."""
        self.measure(sites=[site])
        return next(s for s in self._stats.values() if s.site == site)

    def gate(self, gate: Gate, sensor: Slice) -> Fitted:
        key = (gate, str(sensor.site) if gate.kind == "probe" else json.dumps(sensor.spec()))
        if key not in self._gates:
            self._gates[key] = fit_gate(self.lm, gate, sensor, self.scope, progress=self.progress)
        return self._gates[key]


class Method(Component, family=True):
    """(LM, Scope) -> Patch"""

    @abstractmethod
    def fit(self, study: Study) -> Patch:
        """The patch, made on the study's model from the study's scope."""

    def __call__(self, lm: LM, scope: Scope, *, progress: Progress | None = None) -> Patch:
        return self.fit(Study(lm, scope, progress=progress))

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        """Dictionaries and sites it will ask the study about, so that several methods share one pass."""
        return (), ()


class NoDictionary:
    """A dictionary without features, to measure an activation alone."""

    def __init__(self, site: Site, d_in: int) -> None:
        self.name, self.site, self.site_out, self.d_in = str(site), site, site, d_in
        self.n_features, self.max_norm = 0, float("inf")

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 0)

    def decode(self, acts: Tensor, x: Tensor) -> Tensor:
        return x

    def slice(self, features: Any) -> Slice:
        raise AssertionError("a dictionary without features has no slice")

    def to(self, device: torch.device) -> NoDictionary:
        return self
