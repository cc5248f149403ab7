"""A method takes a model and a scope and leaves a patch. A study shares what several methods measure."""

from __future__ import annotations

import importlib.metadata
import json
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import Tensor

from ..component import Component
from ..data.scope import Scope
from ..dictionaries import Dictionary, Slice, load_dictionary
from ..errors import UnknownName
from ..features import Stats, measure_all
from ..features.gating import Fitted, fit_gate
from ..gates import Gate
from ..lm import LM, Site
from ..patches import Patch
from ..tracking import Progress
from .presets import PRESETS

T = TypeVar("T")
Opened = Callable[[], AbstractContextManager[object]]


class Study:
    """One model and one scope, and every measurement made of them, made once."""

    def __init__(
        self,
        lm: LM,
        scope: Scope,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
        original: Opened | None = None,
    ) -> None:
        """``folder`` keeps what long work needs to go on after it was stopped. Inside ``original()`` the model is
        what training takes as its reference, where that is not the model as it is given.
        """
        self.lm, self.scope, self.folder, self.progress, self.original = lm, scope, folder, progress, original
        self._dictionaries: dict[str, Dictionary] = {}
        self._stats: dict[str, Stats] = {}
        self._gates: dict[Any, Fitted] = {}
        self._found: dict[Hashable, Any] = {}

    def of(self, scope: Scope, *, folder: Path | None = None) -> Study:
        """Of another scope: the same model and dictionaries, nothing measured."""
        found = Study(self.lm, scope, folder=folder, progress=self.progress, original=self.original)
        found._dictionaries = self._dictionaries
        return found

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

    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        """What ``measure`` found when it was first asked for on this scope under this key."""
        key = (self.scope, key)
        if key not in self._found:
            self._found[key] = measure()
        found: T = self._found[key]
        return found


DataKind = Literal["text", "classification"]


class Method(Component, family=True):
    """(LM, Scope) -> Patch"""

    data_kinds: ClassVar[frozenset[DataKind]] = frozenset({"text"})
    """What the passages may be: text to be written, or labels to be chosen."""

    @classmethod
    def parse(cls, spec: Any) -> Self:
        """Also ``{"preset": "npo", "lr": 2e-5}``: a published recipe, with what is given besides in its place.

        Raises UnknownName or InvalidConfig.
        """
        if isinstance(spec, dict) and "preset" in spec:
            name = str(spec["preset"])
            if name not in PRESETS:
                raise UnknownName("preset", name, PRESETS)
            spec = PRESETS[name] | {key: value for key, value in spec.items() if key != "preset"}
        return super().parse(spec)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        if cls is Method:
            preset = {"properties": {"preset": {"enum": sorted(PRESETS)}}, "required": ["preset"], "type": "object"}
            found["anyOf"].append(preset | {"title": "preset"})
        return found

    @abstractmethod
    def fit(self, study: Study) -> Patch:
        """The patch, made on the study's model from the study's scope."""

    def __call__(
        self, lm: LM, scope: Scope, *, folder: str | Path | None = None, progress: Progress | None = None
    ) -> Patch:
        """A method that works long keeps checkpoints in ``folder`` and goes on from them."""
        return self.fit(Study(lm, scope, folder=None if folder is None else Path(folder), progress=progress))

    def record(self, patch: Patch) -> dict[str, Any]:
        """How a patch of this method was made, for ``patch.save(made=...)``: every setting, its seed among them."""
        return {
            "method": self.spec(),
            "data_kinds": sorted(self.data_kinds),
            "access": patch.access,
            "n_parameters": sum(t.numel() for t in patch.tensors().values()),
            "version": importlib.metadata.version("concept-unlearn"),
        }

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        """Dictionaries and sites it will ask the study about, so that several methods share one pass."""
        return (), ()


def preset(name: str, *dictionaries: str) -> Method:
    """``preset("npo")``, or ``preset("dsg", "smollm2/blocks.7.hook_resid_post")``. Raises UnknownName."""
    return Method.parse({"preset": name} | ({"dictionaries": dictionaries} if dictionaries else {}))


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
