"""Split what is to be forgotten, unlearn each part from the same model, merge (SPUNGE, arXiv 2406.11780)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from ..activations.processes import Processes
from ..data.examples import Passage
from ..errors import InvalidConfig, InvalidData, UnknownName
from ..features.clusters import clusters
from ..journal import Journal
from ..lm.fingerprint import checksum, fingerprint
from ..patches import WeightPatch, load_patch, merge
from ..patches.weight import Rule
from .base import Method, Study

OTHER = "other"
"""The part of passages that lack the attribute."""
Parts = dict[str, tuple[Passage, ...]]
Inner = Annotated[Method, WithJsonSchema({"type": "object", "description": "a method, by its kind or preset"})]
"""In a JSON schema only a hint of the family, which a method of methods is a member of."""


class SplitMerge(Method):
    """theta + scale * Merge(tau_1 .. tau_n), tau_i what ``method`` changes to forget part i.

    Each part keeps all that the whole keeps. With a study's folder a part that is finished is not made again, whatever
    it is merged by.
    """

    method: Inner
    """Any that leaves a change of weights."""
    by: str | None = None
    """An attribute of the passages, such as author; none makes clusters of what they are about."""
    clusters: int = Field(4, gt=0)
    """How many, where no attribute is named."""
    missing: Literal["error", "other"] = "error"
    """Passages without the attribute: refused, or a part of their own."""
    merge: Rule = "ties"
    density: float = Field(1.0, ge=0, le=1)
    """Of ties: the share of each parameter's change that is kept."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Of task_arithmetic: by part, 1 where not given."""
    scale: float = Field(1.0, ge=0)
    """Lambda: of the merged change."""
    seed: int | None = None
    """Of the clusters (0 where not given), and of the method in place of its own."""

    def fit(self, study: Study) -> WeightPatch:
        parts = self.split(study)
        if odd := sorted(self.weights.keys() - parts.keys()):
            raise UnknownName("part", odd[0], parts)
        self._claim(study, parts)
        made = [self._part(study, name, passages) for name, passages in parts.items()]
        weighed = self.merge == "task_arithmetic"
        merged = merge(
            made, self.merge, density=self.density,
            weights=[self.weights.get(name, 1.0) for name in parts] if weighed else None,
        )  # fmt: skip
        if self.scale == 1:
            return merged
        return WeightPatch({n: d.scaled(self.scale) for n, d in merged.deltas.items()} if self.scale else {})

    def split(self, study: Study) -> Parts:
        """Disjoint, together all that is to be forgotten, in order of their names. Raises InvalidData."""
        forget = study.scope.forget
        if self.by is not None:
            return by_attribute(forget, self.by, missing=self.missing)
        numbers = clusters(study.lm, forget, self.clusters, seed=self.seed or 0, progress=study.progress)
        return _grouped(forget, [f"cluster {number + 1}" for number in numbers])

    def _part(self, study: Study, name: str, passages: Sequence[Passage]) -> WeightPatch:
        folder = None if study.folder is None else study.folder / _folder(name)
        is_finished = folder is not None and (folder / "patch/config.json").is_file()
        Processes.here().wait()  # nobody finishes before all have looked
        if folder is not None and is_finished:
            found = load_patch(folder / "patch")
        else:
            scope = replace(study.scope, forget=tuple(passages))
            own = Study(study.lm, scope, folder=folder, progress=study.progress, original=study.original)
            found = self._seeded().fit(own)
        if not isinstance(found, WeightPatch):
            raise InvalidConfig(
                f"only changes of weights can be merged; {self.method.kind} leaves a {found.kind} patch"
            )
        if folder is not None and not is_finished:
            _keep(found, folder, study)
        return replace(found, origin=None)

    def _seeded(self) -> Method:
        if self.seed is None or "seed" not in type(self.method).model_fields:
            return self.method
        return self.method.model_copy(update={"seed": self.seed})

    def _claim(self, study: Study, parts: Parts) -> None:
        if study.folder is None:
            return
        kept = [p.model_dump(mode="json") for p in (*study.scope.near, *study.scope.retain)]
        what = {
            "model": fingerprint(study.lm.model), "weights": checksum(study.lm.model), "dtype": str(study.lm.dtype),
            "method": self._seeded().spec(), "kept": _digest(kept),
            "parts": {name: _digest([p.model_dump(mode="json") for p in part]) for name, part in parts.items()},
        }  # fmt: skip
        if study.original is not None:
            with study.original():
                what["reference"] = checksum(study.lm.model)
        Journal(study.folder, what, name="split").claim()


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


def _keep(patch: WeightPatch, folder: Path, study: Study) -> None:
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
