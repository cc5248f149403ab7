"""The logit lens: the answer read off an inner layer, before later ones have talked it over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...errors import InvalidConfig
from ...lm import LM, Context, Site
from ...patches import Patch
from ...patches.base import Switch, check_strength
from ...patches.origin import Origin
from .base import Access, Victim, Way, _Ways, upon


class LogitLens(_Ways):
    """The last norm and the head read layer l's residual stream in place of the last one's; the layer that leaks most.

    Patched where the patch is: what is edited above layer l is passed over.
    """

    access: ClassVar[Access] = "activations"

    stride: int = Field(4, gt=0)
    """One layer in so many, from the last one down, which is the model as it is."""

    def ways(self, victim: Victim) -> Iterable[Way]:
        for layer in layers(victim.lm, self.stride):
            yield Way(upon(victim.patch, LensPatch(layer)), notes={"layer": layer}, effort=layer)


@dataclass(frozen=True)
class LensPatch(Patch):
    """The residual stream after ``layer`` in place of the one after the last, token by token."""

    layer: int
    strength: float = 1.0
    origin: Origin | None = None
    kind = "lens"
    access = "activations"

    def __post_init__(self) -> None:
        check_strength(self.strength)

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        """Raises SiteNotFound for a layer that the model has not."""
        switch, seen, last = Switch(), dict[str, Tensor](), lm.n_layers - 1
        if self.strength == 0 or self.layer == last:
            yield switch
            return

        def see(x: Tensor, _: Context) -> Tensor:
            seen["x"] = x
            return x

        def show(x: Tensor, _: Context) -> Tensor:
            inner = seen.pop("x").to(x.device)
            if not switch.enabled:
                return x
            return inner if self.strength == 1 else torch.lerp(x, inner, self.strength)

        with lm.edit({Site("resid_post", self.layer): see, Site("resid_post", last): show}):
            yield switch

    def spec(self) -> dict[str, Any]:
        return {"layer": self.layer, "strength": self.strength}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> LensPatch:
        return cls(**spec, origin=origin)


def layers(lm: LM, stride: int) -> list[int]:
    """From the last one down, in ascending order. Raises InvalidConfig for a model of one layer."""
    if lm.n_layers < 2:
        raise InvalidConfig(f"{lm.name} has a single layer: there is nothing inside to read")
    return sorted(range(lm.n_layers - 1, -1, -stride))
