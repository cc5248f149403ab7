"""Small learned modules after the feed-forward networks of a frozen model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, linear

from ..errors import InvalidConfig, PatchMismatch
from ..gates import Always
from ..lm import LM, Context, EditFn, Site
from .activation import ActivationPatch, part, shared_fields
from .base import Switch
from .opening import Opening
from .origin import Origin


class Map(NamedTuple):
    """x -> x W^T + b"""

    weight: Float[Tensor, "out d_in"]
    bias: Float[Tensor, " out"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch out"]:
        return linear(x, self.weight.to(x.device), self.bias.to(x.device))


@dataclass(frozen=True, eq=False)
class Adapter(ABC):
    """h -> what is added to it, by one linear map after another."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Adapter]]] = {}
    names: ClassVar[tuple[str, ...]]
    """Of its maps, in the order in which they are applied."""
    maps: Mapping[str, Map] = field(repr=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Adapter.kinds[cls.kind] = cls

    def __post_init__(self) -> None:
        assert tuple(self.maps) == self.names, tuple(self.maps)

    @abstractmethod
    def inputs(self, h: Float[Tensor, "*batch d"]) -> dict[str, Float[Tensor, "*batch _"]]:
        """What goes into each map."""

    def __call__(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        last = self.names[-1]
        return self.maps[last](self.inputs(h)[last])

    @property
    def d(self) -> int:
        return self.maps[self.names[-1]].weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.maps[self.names[-1]].weight.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(m.weight.shape) for name, m in self.maps.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{what}": t for name, m in self.maps.items() for what, t in m._asdict().items()}

    def to(self, device: torch.device) -> Adapter:
        return self.of({name: t.to(device) for name, t in self.tensors().items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Adapter:
        """The one that holds these."""
        return cls({name: Map(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in cls.names})


class Bottleneck(Adapter):
    """h + U gelu(D h + b_D) + b_U"""

    kind = "bottleneck"
    names = ("down", "up")

    def inputs(self, h: Tensor) -> dict[str, Tensor]:
        return {"down": h, "up": gelu(self.maps["down"](h))}


class Linear(Adapter):
    """h + W h + b"""

    kind = "linear"
    names = ("map",)

    def inputs(self, h: Tensor) -> dict[str, Tensor]:
        return {"map": h}


Grams = Mapping[Site, Mapping[str, Float[Tensor, "d d"]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterPatch(ActivationPatch):
    """x' = x + strength * adapter(x), on content tokens let through; padding and BOS are never touched.

    An adapter has no features for a gate to count: a gate needs a sensor.
    """

    adapters: Mapping[Site, Adapter] = field(repr=False)
    """Each at the site that it reads and writes, usually ``mlp_out``."""
    grams: Grams | None = field(default=None, repr=False)
    """Of the inputs of each map on what was forgotten, with a column of ones: what ``fuse`` needs."""
    kind = "adapter"

    def __post_init__(self) -> None:
        if not self.adapters:
            raise InvalidConfig("an adapter patch needs an adapter: adapters={Site: ...}")
        object.__setattr__(self, "adapters", {site: self.adapters[site] for site in sorted(self.adapters)})
        self.check(min(self.adapters))
        if not isinstance(self.gate, Always) and (self.sensor is None or self.gate.per_token):
            raise InvalidConfig(
                f"a {self.gate.kind} gate counts features, and an adapter has none: give a gate for whole sequences, "
                "and a sensor="
            )
        if self.grams is not None and {s: set(g) for s, g in self.grams.items()} != {
            s: set(a.names) for s, a in self.adapters.items()
        }:
            raise InvalidConfig("Gram matrices are of every map of every adapter, or none are given")

    @property
    def n_parameters(self) -> int:
        return sum(t.numel() for adapter in self.adapters.values() for t in adapter.tensors().values())

    def without_grams(self) -> AdapterPatch:
        """It does the same and can no longer be fused; it tells nothing of the forgotten data but what it does."""
        return replace(self, grams=None)

    def edits(self, lm: LM, switch: Switch) -> dict[Site, EditFn]:
        opening = Opening(self.gate, self.sensor, lm.device)
        adapters = {site: adapter.to(lm.device) for site, adapter in self.adapters.items()}
        sites = sorted(set(adapters) | opening.sites)
        return {site: self._at(site, adapters.get(site), opening, switch) for site in sites}

    def _at(self, site: Site, adapter: Adapter | None, opening: Opening, switch: Switch) -> EditFn:
        senses, first = site in opening.sites, site == min(self.adapters)

        def edit(x: Tensor, context: Context) -> Tensor:
            if not switch.enabled:
                return x
            if senses:
                opening.sense(x, context)
            if adapter is None:
                return x
            if x.shape[-1] != adapter.d:
                raise PatchMismatch(f"the adapter at {site} is {adapter.d} wide, and the model is {x.shape[-1]}")
            where = context.tokens & opening.at(x[..., :0], context.tokens, context, first=first)
            wide = x if x.dtype == torch.float64 else x.float()
            change = adapter(x.to(adapter.dtype))
            new = wide + (change if self.strength == 1 else self.strength * change)
            return torch.where(where[..., None], new.to(x.dtype), x)

        return edit

    def spec(self) -> dict[str, Any]:
        return super().spec() | {
            "adapters": {str(site): adapter.kind for site, adapter in self.adapters.items()},
            "grams": self.grams is not None,
        }

    def tensors(self) -> dict[str, Tensor]:
        own = {f"{site}/{name}": t for site, a in self.adapters.items() for name, t in a.tensors().items()}
        grams = {f"gram/{site}/{name}": g for site, held in (self.grams or {}).items() for name, g in held.items()}
        return super().tensors() | own | grams

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> AdapterPatch:
        sites = {Site.parse(name): name for name in spec["adapters"]}
        return cls(
            adapters={s: Adapter.kinds[spec["adapters"][n]].of(part(tensors, f"{n}/")) for s, n in sites.items()},
            grams={s: part(tensors, f"gram/{n}/") for s, n in sites.items()} if spec["grams"] else None,
            **shared_fields(spec, tensors, origin),
        )
