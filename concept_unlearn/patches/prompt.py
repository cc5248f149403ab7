"""A guard before the model: prompts that its gate flags have their embeddings edited, all others pass untouched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..data.encode import pad
from ..dictionaries.base import check_width
from ..errors import InvalidConfig
from ..gates import Always
from ..lm import LM, Context, EditFn, Site
from ..lm.forward import run_until_stopped
from ..lm.oracle import EMBEDDING
from .activation import ActivationPatch, part, shared_fields
from .base import Switch
from .noise import prefix_keys
from .opening import Opening
from .origin import Origin
from .prompt_edits import Prompt, PromptEdit


@dataclass(frozen=True, kw_only=True)
class PromptPatch(ActivationPatch):
    """x' = x + strength * edit(x) on the embeddings of a flagged prompt's text (arXiv 2007.08714, 2406.07933).

    The gate reads the embeddings, decides when the prompt is read and holds to that. What the model writes, padding,
    BOS and what every chat begins with are never touched; prompts that are not flagged stay bit-identical.
    """

    edit: PromptEdit
    queries: int = 0
    """Prompts that the model was asked to learn it."""
    kind = "prompt"
    access = "prompts"

    def __post_init__(self) -> None:
        self.check(EMBEDDING)
        if self.sensor is None and not isinstance(self.gate, Always):
            raise InvalidConfig(f"a {self.gate.kind} gate needs a sensor to read the prompt by: give sensor=")

    def edits(self, lm: LM, switch: Switch) -> dict[Site, EditFn]:
        return {EMBEDDING: _Application(self, lm, switch)}

    @torch.no_grad()
    def flagged(self, lm: LM, prompts: Sequence[Sequence[int]], *, batch_size: int = 64) -> Bool[Tensor, " prompts"]:
        """Which prompts, as token ids, the gate lets through. The model runs no further than its embedding."""
        found = torch.zeros(len(prompts), dtype=torch.bool)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = pad([prompts[i] for i in batch], side="left", device=lm.device)
            application = _Application(self, lm, Switch())
            with lm.edit({EMBEDDING: application}), lm.stop_at(EMBEDDING):
                run_until_stopped(lm.model, ids, mask)
            assert application.open is not None
            found[batch] = application.open.any(1).cpu()
        return found

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"edit": self.edit.spec(), "queries": self.queries}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"edit.{name}": t for name, t in self.edit.tensors().items()}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> PromptPatch:
        edit = PromptEdit.kinds[spec["edit"]["kind"]].restore(spec["edit"], part(tensors, "edit."))
        return cls(edit=edit, queries=spec["queries"], **shared_fields(spec, tensors, origin))


class _Application:
    """A prompt patch at work on one model."""

    def __init__(self, patch: PromptPatch, lm: LM, switch: Switch) -> None:
        self._patch, self._switch = patch, switch
        self._sensor = None if patch.sensor is None else patch.sensor.to(lm.device)
        self._opening = Opening(patch.gate, None, lm.device)
        self.open: Bool[Tensor, "batch seq"] | None = None
        """Where the last pass was let through."""

    def __call__(self, x: Float[Tensor, "batch seq d"], context: Context) -> Float[Tensor, "batch seq d"]:
        if not self._switch.enabled:
            return x
        prompt = self._read(x, context)
        if not x.is_cuda and not prompt.where.any():
            return x
        delta = self._patch.edit(x, prompt)
        if self._patch.strength != 1:
            delta = delta * self._patch.strength
        return torch.where(prompt.where[..., None], (x.float() + delta).to(x.dtype), x)

    def _read(self, x: Float[Tensor, "batch seq d"], context: Context) -> Prompt:
        """What of the pass is flagged prompt, and where in the prompt it stands."""
        text, acts = context.text & context.prompt, None
        tokens = context.tokens
        if self._sensor is not None:
            sensor = self._sensor = self._sensor.to(x.device)
            check_width(sensor, x)
            acts = sensor.encode(x).acts
            tokens = tokens & (x.float().norm(dim=-1) <= sensor.max_norm)
        signal = x.new_zeros(*x.shape[:2], 1) if acts is None else acts
        self.open = text & self._opening.at(signal, tokens, context, first=True)
        before = context.memory.rows.get("text", torch.zeros_like(text[:, 0], dtype=torch.long))
        position = before[:, None] + text.long().cumsum(1) - 1
        context.memory.rows["text"] = position[:, -1] + 1
        return Prompt(self.open, position, None if acts is None else acts.amax(-1), prefix_keys(context))
