"""Edits of the same features, and bans from the same codebook, made for parts of a request and joined into one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..dictionaries import Slice
from ..dictionaries.codebook import Codebook
from ..dictionaries.sae import WholeSlice
from ..dictionaries.slice import ColumnSlice
from ..edits import Edit, Mean
from ..errors import InvalidConfig, PatchMismatch
from .codebook import CodebookPatch
from .feature import FeaturePatch

P = TypeVar("P", FeaturePatch, CodebookPatch)


def union(patches: Sequence[P]) -> P:
    """Every feature that one of them edits is edited, every code that one of them bans is banned; each once.

    All have the same edit, or mode, and the same gate without a sensor of its own, and are as they were made. Values
    that are relative to the residual's norm stay what all features together are worth.
    Raises InvalidConfig, or PatchMismatch for patches of other models, dictionaries or codebooks.
    """
    if not patches:
        raise InvalidConfig("there is nothing to unite")
    kinds = sorted({type(p).__name__ for p in patches})
    if len(kinds) > 1 or not isinstance(patches[0], FeaturePatch | CodebookPatch):
        raise InvalidConfig(f"feature patches are united, or codebook patches, not {', '.join(kinds)}")
    if any(p.strength != 1 or p.sensor is not None for p in patches) or len({p.gate for p in patches}) > 1:
        raise InvalidConfig(
            "patches are united as they were made, at strength 1 and under one gate that has no sensor: leave gates "
            "out, and gate the union"
        )
    if len(origins := {p.origin.fingerprint: p.origin.model for p in patches if p.origin is not None}) > 1:
        raise PatchMismatch(f"these patches were made on different models: {origins}")
    if len(patches) == 1:
        return replace(patches[0], origin=None)
    if isinstance(patches[0], CodebookPatch):
        return _bans([p for p in patches if isinstance(p, CodebookPatch)])
    return _edits([p for p in patches if isinstance(p, FeaturePatch)])


def _bans(patches: Sequence[CodebookPatch]) -> CodebookPatch:
    first = patches[0]
    if any((p.mode, p.error) != (first.mode, first.error) for p in patches) or first.mode == "prune":
        given = sorted({f"{p.mode}, error {p.error}" for p in patches})
        raise InvalidConfig(
            f"bans of one mode are united, and a pruned codebook no longer says which codes it lost; given: "
            f"{'; '.join(given)}. Ban with refill, and prune the union: replace(patch, mode='prune')"
        )
    if len({_digest(p.codebook) for p in patches}) > 1:
        raise PatchMismatch("these patches ban codes of different codebooks")
    return replace(first, origin=None, banned=tuple(sorted({code for p in patches for code in p.banned})))


def _edits(patches: Sequence[FeaturePatch]) -> FeaturePatch:
    """Slices by where they read and write; the last feature of the refuse edit stays the last."""
    places = sorted({(s.site, s.site_out) for p in patches for s in p.slices})
    groups = [[s for p in patches for s in p.slices if (s.site, s.site_out) == place] for place in places]
    ends = patches[0].edit.kind == "refuse"
    return FeaturePatch(
        slices=tuple(_joined(group, ends) for group in groups), edit=_edit(patches), gate=patches[0].gate
    )


def _edit(patches: Sequence[FeaturePatch]) -> Edit:
    """The one of all; of means, which each feature has its own of, those of the union."""
    first = patches[0].edit
    if isinstance(first, Mean):
        means: dict[int, float] = {}
        for p in patches:
            if not isinstance(p.edit, Mean) or p.edit.values is None or len(p.slices) > 1:
                raise InvalidConfig("means are united where each patch has one dictionary and a value for each feature")
            means |= dict(zip(p.slices[0].features, p.edit.values, strict=True))
        return Mean(values=tuple(means[feature] for feature in _order([p.slices[0] for p in patches], False)))
    if other := [p.edit for p in patches if p.edit != first]:
        raise InvalidConfig(f"patches of one edit are united; given: {first.spec()} and {other[0].spec()}")
    return first


def _order(slices: Iterable[Slice], ends: bool) -> tuple[int, ...]:
    """Features from the lowest id up; where the last of each is another kind of feature, that one last."""
    lists = [s.features for s in slices]
    if not ends:
        return tuple(sorted({feature for own in lists for feature in own}))
    if len(last := {own[-1] for own in lists}) > 1:
        raise InvalidConfig(f"the refuse edit raises one feature of each dictionary; given: {sorted(last)}")
    return (*sorted({feature for own in lists for feature in own[:-1]} - last), last.pop())


def _joined(slices: Sequence[Slice], ends: bool) -> Slice:
    first = slices[0]
    order = _order(slices, ends)
    if isinstance(first, WholeSlice):
        whole = [s for s in slices if isinstance(s, WholeSlice)]
        if len(whole) < len(slices) or len({_digest(s.dictionary.sae) for s in whole}) > 1:
            raise PatchMismatch(f"at {first.site} these patches edit features of different dictionaries")
        return replace(first, columns=_columns([s.columns for s in whole], order))
    columns = [s for s in slices if isinstance(s, ColumnSlice)]
    if len(columns) < len(slices):
        raise PatchMismatch(f"at {first.site} these patches edit features of different dictionaries")
    return _columns(columns, order)


def _columns(slices: Sequence[ColumnSlice], order: Sequence[int]) -> ColumnSlice:
    """Raises PatchMismatch where two call different columns by the same number."""
    first = slices[0]
    found: dict[int, dict[str, Tensor]] = {}
    for s in slices:
        if (
            s.spec() | {"features": []} != first.spec() | {"features": []}
            or s.tensors().keys() != first.tensors().keys()
        ):
            raise PatchMismatch(f"at {first.site} these patches edit features of different dictionaries")
        for i, feature in enumerate(s.features):
            own = {name: t.select(_axis(name), i).cpu() for name, t in s.tensors().items()}
            if any(not torch.equal(t, own[name]) for name, t in found.get(feature, {}).items()):
                raise PatchMismatch(
                    f"feature {feature} at {first.site} is not the same in all of these patches: they are of different "
                    "dictionaries, or directions of no dictionary"
                )
            found[feature] = own
    tensors = {name: torch.stack([found[feature][name] for feature in order], _axis(name)) for name in first.tensors()}
    plain = {f.name: getattr(first, f.name) for f in fields(first) if f.name not in tensors}
    return ColumnSlice(**plain | tensors | {"features": tuple(order)})


def _axis(name: str) -> int:
    """Along which the features of a slice lie."""
    return 1 if name == "W_enc" else 0


def _digest(module: Codebook | torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
