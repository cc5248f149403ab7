"""Which model a patch was made on, and a canary by which a loaded patch is known to reach it still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..component import Frozen
from ..errors import PatchMismatch, PatchNotReached
from ..lm import LM

if TYPE_CHECKING:
    from .base import Patch

_CANDIDATES = 6
"""Texts that are tried, however many are given."""
_N_LOGITS = 64
_TOLERANCE = 0.5
"""Share of the effect that may be missing: bfloat16 loses some of a small one, a lost hook loses all."""
_DEFAULT_TEXT = "Once upon a time there was a small town by the sea, and everybody in it knew everybody else."


class Canary(Frozen):
    """Token ids, and what the patch adds to 64 evenly spaced logits after their last token."""

    ids: tuple[int, ...]
    effect: tuple[float, ...]


class Origin(Frozen):
    model: str
    fingerprint: str
    canary: Canary

    @classmethod
    def of(cls, patch: Patch, lm: LM, texts: Sequence[str] = ()) -> Origin:
        """The canary is that of the first few texts that the patch changes most; with none, an ordinary sentence."""
        candidates = [lm.encode(text, chat=False)[:48] for text in (texts or [_DEFAULT_TEXT])[:_CANDIDATES]]
        effects = [_effect(patch, lm, ids) for ids in candidates]
        best = max(range(len(effects)), key=lambda i: float(effects[i].norm()))
        canary = Canary(ids=tuple(candidates[best]), effect=tuple(effects[best].tolist()))
        return cls(model=lm.name, fingerprint=lm.fingerprint, canary=canary)

    def check(self, patch: Patch, lm: LM, *, any_base: bool) -> None:
        """Raises PatchMismatch for another base model, PatchNotReached if the canary stays silent."""
        if not any_base and lm.fingerprint != self.fingerprint:
            raise PatchMismatch(
                f"this patch was made on {self.model} ({self.fingerprint}); the model here is {lm.name} "
                f"({lm.fingerprint}). If they are the same model in another guise, load with any_base=True"
            )
        want = torch.tensor(self.canary.effect)
        missing = (_effect(patch, lm, list(self.canary.ids)) - want).norm()
        if missing > _TOLERANCE * want.norm():
            raise PatchNotReached(
                f"the patch no longer does to {lm.name} what it did when it was saved: of the canary's effect "
                f"{float(want.norm()):.3g} it misses {float(missing):.3g}"
            )


@torch.no_grad()
def _effect(patch: Patch, lm: LM, ids: Sequence[int]) -> Float[Tensor, " 64"]:
    row = torch.tensor([list(ids)], device=lm.device)
    without = lm.logits(row)[0, -1]
    with patch.on(lm):
        change = (lm.logits(row)[0, -1] - without).float()
    return change[:: max(len(change) // _N_LOGITS, 1)][:_N_LOGITS].cpu()
