"""Features of a patch switched off one by one, while all others do exactly what they did."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..dictionaries import Slice
from ..dictionaries.slice import Encoded
from ..lm import Site
from ..patches import CodebookPatch, FeaturePatch, Patch


@dataclass(frozen=True)
class Muted:
    """A slice some of whose features never fire and write nothing; a gate does not hear of them either."""

    inner: Slice
    keep: Float[Tensor, " k"]
    """1 for a feature that is on, 0 for one that is off."""

    @property
    def site(self) -> Site:
        return self.inner.site

    @property
    def site_out(self) -> Site:
        return self.inner.site_out

    @property
    def features(self) -> tuple[int, ...]:
        return self.inner.features

    @property
    def W_dec(self) -> Float[Tensor, "k d_out"]:  # noqa: N802
        return self.inner.W_dec * self.keep[:, None].to(self.inner.W_dec.device)

    @property
    def max_norm(self) -> float:
        return self.inner.max_norm

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def encode(self, x: Float[Tensor, "*batch d"]) -> Encoded:
        acts, scale = self.inner.encode(x)
        return Encoded(acts * self.keep.to(acts.device), scale)

    def to(self, device: torch.device) -> Muted:
        return replace(self, inner=self.inner.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()

    def spec(self) -> dict[str, Any]:
        return self.inner.spec()


Named = tuple[str, int]
"""A site and a feature read there."""


def features_of(patch: Patch) -> tuple[Named, ...]:
    """Those that can be switched off one by one."""
    if isinstance(patch, FeaturePatch):
        return tuple((str(s.site), feature) for s in patch.slices for feature in s.features)
    if isinstance(patch, CodebookPatch):
        return tuple((str(patch.codebook.site), code) for code in patch.banned)
    return ()


def without(patch: Patch, off: Collection[Named]) -> Patch | None:
    """The patch without these features; None where nothing is left of it."""
    named = features_of(patch)
    gone = [name in off for name in named]
    if not any(gone):
        return patch
    if all(gone):
        return None
    if isinstance(patch, CodebookPatch):
        return replace(patch, banned=tuple(code for (_, code), out in zip(named, gone, strict=True) if not out))
    assert isinstance(patch, FeaturePatch)
    muted = tuple(
        Muted(s, torch.tensor([float((str(s.site), feature) not in off) for feature in s.features]))
        for s in patch.slices
    )
    return replace(patch, slices=muted)
