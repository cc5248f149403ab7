"""Split what is to be forgotten, unlearn each part from the same model, merge (SPUNGE, arXiv 2406.11780)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, WithJsonSchema

from ..activations.processes import Processes
from ..data.examples import Passage
from ..dictionaries import direction
from ..errors import InvalidConfig, InvalidData, UnknownName
from ..features.clusters import clusters
from ..gates import Always, Gate
from ..journal import Journal
from ..lm import Site
from ..lm.fingerprint import checksum, fingerprint
from ..patches import AdapterPatch, CodebookPatch, FeaturePatch, Patch, WeightPatch, fuse, load_patch, merge
from ..patches.codebook import CodeSlice
from ..patches.union import union
from ..patches.weight import Rule
from .base import Method, Study

OTHER = "other"
"""The part of passages that lack the attribute."""
Parts = dict[str, tuple[Passage, ...]]
Merged = WeightPatch | FeaturePatch | CodebookPatch | AdapterPatch
Inner = Annotated[Method, WithJsonSchema({"type": "object", "description": "a method, by its kind or preset"})]
"""In a JSON schema only a hint of the family, which a method of methods is a member of."""


class SplitMerge(Method):
    """theta + scale * Merge(tau_1 .. tau_n), tau_i what ``method`` changes to forget part i.

    Features that are edited and codes that are banned are united, adapters are fused; a gate of the method is fitted
    once, on the whole. Each part keeps all that the whole keeps. With a study's folder a part that is finished is not
    made again, whatever it is merged by.
    """

    method: Inner
    """Any that leaves a change of weights, an edit of features, banned codes or adapters."""
    by: str | None = None
    """An attribute of the passages, such as author; none makes clusters of what they are about."""
    clusters: int = Field(4, gt=0)
    """How many, where no attribute is named."""
    missing: Literal["error", "other"] = "error"
    """Passages without the attribute: refused, or a part of their own."""
    merge: Rule = "ties"
    """This, and what is below but for the seed: of changes of weights alone."""
    density: float = Field(1.0, ge=0, le=1)
    """Of ties: the share of each parameter's change that is kept."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Of task_arithmetic: by part, 1 where not given."""
    scale: float = Field(1.0, ge=0)
    """Lambda: of the merged change."""
    seed: int | None = None
    """Of the clusters (0 where not given), and of the method in place of its own."""

    def fit(self, study: Study) -> Merged:
        parts = self.split(study)
        if odd := sorted(self.weights.keys() - parts.keys()):
            raise UnknownName("part", odd[0], parts)
        self._claim(study, parts)
        made: list[Merged] = []
        for name, passages in parts.items():
            made.append(self._part(study, name, passages))
            if not isinstance(made[-1], WeightPatch):  # before the other parts take their time
                self._check_plain(made[-1])
        weights = [p for p in made if isinstance(p, WeightPatch)]
        if len(weights) == len(made):
            return self._merged(weights, tuple(parts))
        return self._gated(study, _united(made))

    def _merged(self, made: Sequence[WeightPatch], names: Sequence[str]) -> WeightPatch:
        weighed = self.merge == "task_arithmetic"
        merged = merge(
            made, self.merge, density=self.density,
            weights=[self.weights.get(name, 1.0) for name in names] if weighed else None,
        )  # fmt: skip
        if self.scale == 1:
            return merged
        return WeightPatch({n: d.scaled(self.scale) for n, d in merged.deltas.items()} if self.scale else {})

    def _check_plain(self, patch: Patch) -> None:
        given = {"merge": self.merge, "density": self.density, "weights": self.weights, "scale": self.scale}
        odd = [
            name
            for name, value in given.items()
            if value != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if odd:
            raise InvalidConfig(
                f"{odd[0]} is of changes of weights, and {self.method.kind} leaves a {patch.kind} patch: leave it out"
            )

    def _gated(self, study: Study, patch: Merged) -> Merged:
        """With the gate of the method, which the parts were made without."""
        gate: Gate = getattr(self.method, "gate", Always())
        if isinstance(gate, Always) or isinstance(patch, WeightPatch):
            return patch
        match patch:
            case FeaturePatch():
                reads = min(patch.slices, key=lambda s: s.site)
            case CodebookPatch():
                reads = CodeSlice(patch.codebook, patch.banned)
            case AdapterPatch():
                nothing = torch.zeros(study.lm.d_model)
                reads = direction(Site("resid_pre", min(patch.adapters).layer), nothing, nothing)
        fitted, sensor = study.gate(gate, reads)
        return replace(patch, gate=fitted, sensor=sensor)

    def split(self, study: Study) -> Parts:
        """Disjoint, together all that is to be forgotten, in order of their names. Raises InvalidData."""
        forget = study.scope.forget
        if self.by is not None:
            return by_attribute(forget, self.by, missing=self.missing)
        numbers = clusters(study.lm, forget, self.clusters, seed=self.seed or 0, progress=study.progress)
        return _grouped(forget, [f"cluster {number + 1}" for number in numbers])

    def _part(self, study: Study, name: str, passages: Sequence[Passage]) -> Merged:
        folder = None if study.folder is None else study.folder / _folder(name)
        is_finished = folder is not None and (folder / "patch/config.json").is_file()
        Processes.here().wait()  # nobody finishes before all have looked
        if folder is not None and is_finished:
            found = load_patch(folder / "patch")
        else:
            found = self._inner().fit(study.of(replace(study.scope, forget=tuple(passages)), folder=folder))
        if not isinstance(found, Merged) or _is_steering(found):
            raise InvalidConfig(
                "only changes of weights, edits of a dictionary's features, bans and adapters can be merged; "
                f"{self.method.kind} leaves a {found.kind} patch{' of directions' if _is_steering(found) else ''}"
            )
        if folder is not None and not is_finished:
            _keep(found, folder, study)
        return replace(found, origin=None)

    def _inner(self) -> Method:
        """The method of a part: with this seed, where it has one, and without a gate."""
        known, own = type(self.method).model_fields, {"seed": self.seed, "gate": Always()}
        changes = {name: value for name, value in own.items() if name in known and value is not None}
        return self.method.model_copy(update=changes) if changes else self.method

    def _claim(self, study: Study, parts: Parts) -> None:
        if study.folder is None:
            return
        kept = [p.model_dump(mode="json") for p in (*study.scope.near, *study.scope.retain)]
        what = {
            "model": fingerprint(study.lm.model), "weights": checksum(study.lm.model), "dtype": str(study.lm.dtype),
            "method": self._inner().spec(), "kept": _digest(kept),
            "parts": {name: _digest([p.model_dump(mode="json") for p in part]) for name, part in parts.items()},
        }  # fmt: skip
        if study.original is not None:
            with study.original():
                what["reference"] = checksum(study.lm.model)
        Journal(study.folder, what, name="split").claim()


def _united(made: Sequence[Merged]) -> Merged:
    """Parts that are no changes of weights, as one. Raises InvalidConfig where they are of several kinds."""
    adapters = [p for p in made if isinstance(p, AdapterPatch)]
    features = [p for p in made if isinstance(p, FeaturePatch)]
    bans = [p for p in made if isinstance(p, CodebookPatch)]
    if len(adapters) == len(made):
        return fuse(adapters)
    if len(features) == len(made):
        return union(features)
    if len(bans) == len(made):
        return union(bans)
    raise InvalidConfig(f"parts of one kind are merged; given: {', '.join(sorted({p.kind for p in made}))}")


def _is_steering(patch: Patch) -> bool:
    """Directions have no numbers to tell them apart by, and a part's own is another direction."""
    return isinstance(patch, FeaturePatch) and any(s.spec().get("activation") == "linear" for s in patch.slices)


def by_attribute(passages: Sequence[Passage], name: str, *, missing: Literal["error", "other"] = "error") -> Parts:
    """Passages by the value of one of their attributes. Raises InvalidData where some lack it and ``missing`` is error,
    or where all do.
    """
    values = [p.attribute(name) for p in passages]
    lacking = values.count(None)
    if lacking and (missing == "error" or lacking == len(passages)):
        known = sorted({other for p in passages for other, _ in p.attributes})
        fix = f', or send them to a part of their own: missing="{OTHER}"' if lacking < len(passages) else ""
        raise InvalidData(
            f"{lacking} of {len(passages)} passages to forget have no attribute {name!r}; known: "
            f"{', '.join(known) or 'none'}. Give each of them attributes={{{name!r}: ...}}, split by another{fix}"
        )
    if lacking and OTHER in values:
        raise InvalidData(f"{name!r} has the value {OTHER!r}, which is what passages without it would be called")
    return _grouped(passages, [OTHER if value is None else value for value in values])


def _grouped(passages: Sequence[Passage], names: Sequence[str]) -> Parts:
    found: dict[str, list[Passage]] = {name: [] for name in sorted(set(names))}
    for passage, name in zip(passages, names, strict=True):
        found[name].append(passage)
    return {name: tuple(part) for name, part in found.items()}


def _folder(part: str) -> str:
    """A name of its own, and one that any file system takes."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', part)[:40]}-{_digest(part)[:6]}"


def _keep(patch: Patch, folder: Path, study: Study) -> None:
    """A part that is finished; what would have helped to finish it goes."""
    here = Processes.here()
    met = patch.met(study.lm)
    if here.rank == 0:
        met.save(folder / "patch")
        for left in folder.glob("*.safetensors"):
            left.unlink()
    here.wait()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
