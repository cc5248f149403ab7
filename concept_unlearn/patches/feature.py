"""Chosen features of a dictionary edited in the residual stream, where a gate lets them be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..dictionaries import Dictionary, Slice, as_dictionary
from ..dictionaries.base import check_width
from ..dictionaries.sae import restore_slice
from ..edits import Clamp, Edit
from ..errors import InvalidConfig
from ..lm import LM, Context, EditFn, Site
from .activation import ActivationPatch, part, shared_fields
from .base import Switch
from .opening import Opening
from .origin import Origin


@dataclass(frozen=True, kw_only=True)
class FeaturePatch(ActivationPatch):
    """x' = x + strength * sum_i (t_i - a_i) W_dec[i] over the chosen features, on content tokens let through.

    Given a ``dictionary`` (also a SAELens SAE) and its ``features``, or several and their lists, or ready
    ``slices``. Padding, BOS and sink tokens are never touched; untouched tokens stay bit-identical.
    """

    dictionary: InitVar[Any] = None
    features: InitVar[Sequence[int] | Sequence[Sequence[int]] | None] = None
    slices: tuple[Slice, ...] = ()
    edit: Edit = Clamp()
    kind = "feature"

    def __post_init__(self, dictionary: Any, features: Any) -> None:
        slices = self.slices if dictionary is None else _slices(dictionary, features)
        if not slices:
            raise InvalidConfig("a feature patch needs dictionary=... and features=..., or slices=...")
        object.__setattr__(self, "slices", tuple(sorted(slices, key=lambda s: s.site)))
        object.__setattr__(self, "edit", Edit.parse(self.edit))
        self.check(min(s.site_out for s in self.slices))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(s.site for s in self.slices)

    def edits(self, lm: LM, switch: Switch) -> dict[Site, EditFn]:
        return _Application(self, lm, switch).edits()

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"edit": self.edit.spec(), "slices": [s.spec() for s in self.slices]}

    def tensors(self) -> dict[str, Tensor]:
        own = {f"slice{i}.{name}": t for i, s in enumerate(self.slices) for name, t in s.tensors().items()}
        return super().tensors() | own

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> FeaturePatch:
        return cls(
            slices=tuple(restore_slice(s, part(tensors, f"slice{i}.")) for i, s in enumerate(spec["slices"])),
            edit=Edit.parse(spec["edit"]),
            **shared_fields(spec, tensors, origin),
        )


class _Application:
    """A feature patch at work on one model: what it computes at one site and uses at a later one."""

    def __init__(self, patch: FeaturePatch, lm: LM, switch: Switch) -> None:
        self._patch, self._switch = patch, switch
        self._slices = [s.to(lm.device) for s in patch.slices]
        self._opening = Opening(patch.gate, patch.sensor, lm.device)
        self._pending: dict[int, Float[Tensor, "batch seq d"] | None] = {}
        self._row_norms = [s.W_dec.norm(dim=-1).clamp(min=1e-12) for s in self._slices]

    def edits(self) -> dict[Site, EditFn]:
        """One function a site: the gate's sensor first, then what is read there, then what is written there."""
        slices = self._slices
        sites = {s.site for s in slices} | {s.site_out for s in slices} | self._opening.sites
        return {site: self._at(site) for site in sorted(sites)}

    def _at(self, site: Site) -> EditFn:
        reads = [i for i, s in enumerate(self._slices) if s.site == site]
        writes = [i for i, s in enumerate(self._slices) if s.site_out == site]
        senses = site in self._opening.sites

        def edit(x: Tensor, context: Context) -> Tensor:
            if not self._switch.enabled:
                return x
            if senses:
                self._opening.sense(x, context)
            for i in reads:
                self._pending[i] = self._delta(i, x, context)
            for i in writes:
                delta = self._pending.pop(i)
                if delta is not None:
                    x = torch.where((delta != 0).any(-1, keepdim=True), x + delta.to(x.dtype), x)
            return x

        return edit

    def _delta(self, i: int, x: Tensor, context: Context) -> Float[Tensor, "batch seq d_out"] | None:
        """What is to be added, in float32; None where that is nothing at all."""
        patch = self._patch
        chosen = self._slices[i] = self._slices[i].to(x.device)
        check_width(chosen, x)
        acts, scale = chosen.encode(x)
        norm = x.float().norm(dim=-1, keepdim=True)
        tokens = context.tokens & (norm[..., 0] <= chosen.max_norm)
        where = tokens & self._opening.at(acts, tokens, context, first=i == 0)
        unit = norm / (acts.shape[-1] * self._row_norms[i].to(x.device))
        if scale is not None:
            unit = unit / scale
        change = patch.edit(acts, unit) - acts
        change = torch.where(where[..., None], change, 0.0)
        if not change.is_cuda and not change.any():
            return None
        if scale is not None:
            change = change * scale
        delta = change @ chosen.W_dec
        return delta if patch.strength == 1 else delta * patch.strength


def _slices(dictionary: Any, features: Any) -> list[Slice]:
    dictionaries: list[Dictionary]
    if isinstance(dictionary, Sequence):
        dictionaries, lists = [as_dictionary(d) for d in dictionary], list(features or ())
    else:
        dictionaries, lists = [as_dictionary(dictionary)], [features or ()]
    if len(dictionaries) != len(lists):
        raise InvalidConfig(f"{len(dictionaries)} dictionaries need as many lists of features; given: {len(lists)}")
    return [d.slice(chosen) for d, chosen in zip(dictionaries, lists, strict=True)]
