"""What an activation patch asks its gate, wherever the gate's signal comes from."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dictionaries import Slice
from ..dictionaries.base import check_width
from ..gates import Gate, Signal
from ..lm import Context, Site


class Opening:
    """Where a gate lets an edit be. It hears of the sensor's activation first, then of each edited site's."""

    def __init__(self, gate: Gate, sensor: Slice | None, device: torch.device) -> None:
        self._gate = gate
        self._sensor = None if sensor is None else sensor.to(device)
        self._open: Bool[Tensor, "batch seq"] | None = None

    @property
    def sites(self) -> set[Site]:
        """Of the sensor, where the gate has one of its own."""
        return set() if self._sensor is None else {self._sensor.site}

    def sense(self, x: Float[Tensor, "batch seq d"], context: Context) -> None:
        """The activation at the sensor's site."""
        assert self._sensor is not None
        check_width(self._sensor, x)
        tokens = context.text & (x.float().norm(dim=-1) <= self._sensor.max_norm)
        self._open = self._gate(Signal(self._sensor.encode(x).acts, tokens, context.prompt), context.memory)

    def at(
        self, acts: Float[Tensor, "batch seq k"], tokens: Bool[Tensor, "batch seq"], context: Context, *, first: bool
    ) -> Bool[Tensor, "batch seq"]:
        """At a site with these activations. Without a sensor the first site decides, or each for itself by token."""
        if self._gate.per_token or (self._sensor is None and first):
            seen = tokens if self._gate.per_token else tokens & context.text
            self._open = self._gate(Signal(acts, seen, context.prompt), context.memory)
        assert self._open is not None
        return self._open.to(acts.device)
