"""Adapters of successive requests made into one, from what each of them saw of its own request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InvalidConfig, PatchMismatch
from ..gates import Always
from ..lm import LM, Site
from ..tracking import Progress
from ..weights.fusion import RIDGE, fuse_maps, gram, with_ones
from .adapter import Adapter, AdapterPatch, Map
from .inputs import N_INPUTS, Inputs, hear_inputs
from .refine import drawn, refined


def with_grams(
    patch: AdapterPatch, lm: LM, texts: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> AdapterPatch:
    """The patch with G = X^T X of the inputs X of each of its maps, on the content tokens of encoded texts.

    They are what comes there while the patch itself is on. Raises EmptyData where there is no text.
    """
    found: dict[Site, dict[str, Tensor]] = defaultdict(dict)

    def hear(site: Site, x: Tensor) -> None:
        adapter = patch.adapters[site]
        for name, given in adapter.inputs(x.to(adapter.dtype)).items():
            seen = gram(with_ones(given))
            found[site][name] = found[site][name] + seen if name in found[site] else seen

    hear_inputs(patch, lm, texts, hear, progress=progress)
    return replace(patch, grams={site: {name: g.cpu() for name, g in own.items()} for site, own in found.items()})


def fuse(
    patches: Sequence[AdapterPatch],
    *,
    ridge: float = RIDGE,
    refine: int = 0,
    samples: Sequence[Inputs] | None = None,
) -> AdapterPatch:
    """One patch of several, each fitted on a request of its own: every linear map by least squares (``fuse_maps``).

    What a map is to do on each request's tokens it is, as far as one map can. For bottlenecks the first maps are fused,
    then the second ones, each as if the other had stayed: exact for every map, not for both together. So many steps of
    ``refine`` then move both together, to do on each request's inputs what its own adapter does: on ``samples``, which
    ``inputs_of`` takes of each patch, or on normal ones of the moments that the Gram matrices tell. The Gram matrices
    add up, so the result can be fused with what comes later.
    Raises InvalidConfig for patches without Gram matrices, weakened or gated ones, PatchMismatch for patches of other
    models, sites, kinds or shapes.
    """
    if not patches:
        raise InvalidConfig("there is nothing to fuse")
    if wrong := [p for p in patches if not isinstance(p, AdapterPatch)]:
        raise InvalidConfig(f"only adapter patches can be fused; given: {type(wrong[0]).__name__}")
    if any(p.grams is None for p in patches):
        raise InvalidConfig("a patch without Gram matrices cannot be fused: fit it with grams, and keep them")
    if any(p.strength != 1 or not isinstance(p.gate, Always) for p in patches):
        raise InvalidConfig("patches are fused as they were made, at strength 1 and without a gate; gate the result")
    if len(origins := {p.origin.fingerprint: p.origin.model for p in patches if p.origin is not None}) > 1:
        raise PatchMismatch(f"these patches were made on different models: {origins}")
    shapes = [{str(site): (a.kind, a.shapes) for site, a in p.adapters.items()} for p in patches]
    if other := [found for found in shapes if found != shapes[0]]:
        raise PatchMismatch(f"only adapters of the same sites, kinds and shapes are fused: {shapes[0]}, {other[0]}")
    _check_samples(patches, refine, samples)
    fused: dict[Site, Adapter] = {}
    grams: dict[Site, dict[str, Tensor]] = {}
    for site, first in patches[0].adapters.items():
        adapters = [p.adapters[site] for p in patches]
        seen = {name: [p.grams[site][name].cpu() for p in patches if p.grams is not None] for name in first.names}
        fused[site] = type(first)({n: _fuse([a.maps[n] for a in adapters], own, ridge) for n, own in seen.items()})
        grams[site] = {name: torch.stack(own).sum(0) for name, own in seen.items()}
        if refine and len(first.names) > 1:  # one map alone is the best there is
            own = seen[first.names[0]]
            inputs = (
                [drawn(g, N_INPUTS, seed=i) for i, g in enumerate(own)]
                if samples is None
                else [s[site] for s in samples]
            )
            fused[site] = refined(fused[site], adapters, inputs, [float(g[-1, -1]) for g in own], refine)
    return AdapterPatch(adapters=fused, grams=grams)


def _check_samples(patches: Sequence[AdapterPatch], refine: int, samples: Sequence[Inputs] | None) -> None:
    if refine < 0:
        raise InvalidConfig(f"refine counts steps, 0 or more; given: {refine}")
    if samples is None:
        return
    if not refine:
        raise InvalidConfig("samples are what refine moves the maps on: give refine=50, or leave them out")
    sites = set(patches[0].adapters)
    if len(samples) != len(patches) or any(not sites <= set(s) or not all(map(len, s.values())) for s in samples):
        raise InvalidConfig(
            f"samples are one mapping a patch, from each of the sites {', '.join(map(str, sorted(sites)))} to inputs "
            "[n, d]: inputs_of(patch, lm, texts) takes them"
        )


def _fuse(maps: Sequence[Map], grams: Sequence[Tensor], ridge: float) -> Map:
    """The bias is the row that meets the column of ones."""
    stacked = [torch.cat([m.weight.detach().cpu().T, m.bias.detach().cpu()[None]]) for m in maps]
    fused = fuse_maps(grams, stacked, ridge=ridge).to(stacked[0].dtype)
    return Map(fused[:-1].T.contiguous(), fused[-1].clone())
