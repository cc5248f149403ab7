"""What all patches of an activation share: a gate that says where, a sensor that it reads, a strength."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..dictionaries import Slice
from ..dictionaries.sae import restore_slice
from ..errors import InvalidConfig
from ..gates import Always, Gate
from ..lm import LM, EditFn, Site
from .base import Patch, Switch, check_strength
from .origin import Origin


@dataclass(frozen=True, kw_only=True)
class ActivationPatch(Patch):
    """A patch that edits activations of the live model, where its gate lets it."""

    gate: Gate = Always()
    sensor: Slice | None = None
    """What the gate reads; by default what the patch itself reads at its shallowest site."""
    strength: float = 1.0
    origin: Origin | None = None
    access = "activations"

    @abstractmethod
    def edits(self, lm: LM, switch: Switch) -> Mapping[Site, EditFn]:
        """The functions at work on this model while the patch is on."""

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        switch = Switch()
        if self.strength == 0:
            yield switch
            return
        with lm.edit(self.edits(lm, switch)):
            yield switch

    def check(self, first: Site) -> None:
        """Of what was given, what is shared; ``first`` is the shallowest site that is edited. Raises InvalidConfig."""
        object.__setattr__(self, "gate", Gate.parse(self.gate))
        check_strength(self.strength)
        if self.sensor is not None and self.sensor.site > first:
            raise InvalidConfig(
                f"the gate reads {self.sensor.site}, which the model computes after the edit at {first}"
            )

    def spec(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "gate": self.gate.spec(),
            "sensor": None if self.sensor is None else self.sensor.spec(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.sensor is None else {f"sensor.{name}": t for name, t in self.sensor.tensors().items()}


def shared_fields(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: Origin | None) -> dict[str, Any]:
    """The fields of an ``ActivationPatch`` as they were saved."""
    return {
        "gate": Gate.parse(spec["gate"]),
        "sensor": None if spec["sensor"] is None else restore_slice(spec["sensor"], part(tensors, "sensor.")),
        "strength": spec["strength"],
        "origin": origin,
    }


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
