"""A guard before the model that works by text alone: prompts that its gate flags are read behind a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..dictionaries import Slice
from ..gates import Always, Gate
from ..lm import LM, Context
from .activation import shared_fields
from .base import Patch, Switch, check_strength
from .origin import Origin
from .prompt import PromptPatch
from .prompt_edits import Vectors


@dataclass(frozen=True, kw_only=True)
class PrefixPatch(Patch):
    """A flagged prompt's text is read behind the first ``strength`` x n of a prefix's n tokens, begun anew above 1.

    No embedding and no activation of the model is changed, and what is said is said to the prompt's own tokens. The
    gate is a ``PromptPatch``'s: it reads embeddings, once, when a sequence begins.
    """

    text: str
    ids: tuple[int, ...]
    """Of the text, in the model's own tokens."""
    gate: Gate = Always()
    sensor: Slice | None = None
    queries: int = 0
    """Prompts that the model was asked to choose it."""
    strength: float = 1.0
    origin: Origin | None = None
    kind = "prefix"
    access = "prompts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate", Gate.parse(self.gate))
        check_strength(self.strength)
        self._guard(1)

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        switch, n = Switch(), round(self.strength * len(self.ids))
        if not n:
            yield switch
            return
        guard = self._guard(lm.d_model)

        def chosen(ids: Int[Tensor, "batch seq"], context: Context) -> Bool[Tensor, " batch"]:
            if not switch.enabled:
                return torch.zeros(len(ids), dtype=torch.bool)
            given = context.real & context.prompt
            return guard.flagged(lm, [row[own].tolist() for row, own in zip(ids, given, strict=True)])

        with lm.insert(tuple(islice(cycle(self.ids), n)), chosen):
            yield switch

    def flagged(self, lm: LM, prompts: Sequence[Sequence[int]]) -> Bool[Tensor, " prompts"]:
        """Which prompts, as token ids, are prefixed."""
        return self._guard(lm.d_model).flagged(lm, prompts)

    def _guard(self, d_model: int) -> PromptPatch:
        """Raises InvalidConfig for a gate without what it reads by."""
        return PromptPatch(edit=Vectors(torch.zeros(1, d_model)), gate=self.gate, sensor=self.sensor)

    def spec(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "text": self.text,
            "ids": list(self.ids),
            "gate": self.gate.spec(),
            "sensor": None if self.sensor is None else self.sensor.spec(),
            "queries": self.queries,
        }

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.sensor is None else {f"sensor.{name}": t for name, t in self.sensor.tensors().items()}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> PrefixPatch:
        shared = shared_fields(spec, tensors, origin)
        return cls(text=spec["text"], ids=tuple(spec["ids"]), queries=spec["queries"], **shared)
