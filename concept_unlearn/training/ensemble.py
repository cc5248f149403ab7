"""A small model in training beside a big one: losses are of what both say together, gradients reach the small one.

l_e = l_M + alpha (l_o' - l_o). What goes into the three heads stands side by side, so that a step, a cached reference
and the loop see one model with one head.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..lm import LM
from ..lm.ensemble import offset
from ..lm.head import Ending, Head
from ..step import Batch, LiveReference
from ..weights import Delta
from .trainable import Trainable

_KEPT = 2**30
"""Bytes of what the big model says that are kept, so that it is asked once for each row."""


class Pair(Trainable):
    """The small model's parameters; ``lm`` is the big one, which is its own reference."""

    def __init__(self, lm: LM, big: Ending, small: Trainable, *, alpha: float, n: int) -> None:
        """``n`` is how many tokens both know."""
        self.lm, self.parameters = lm, small.parameters
        self._big, self._small, self._alpha, self._n = big, small, alpha, n

    def head(self) -> Ending:
        own = Head(self._small.lm.model)
        return Ensemble(self._big, own, self._small.reference(own), alpha=self._alpha, n=self._n)

    def reference(self, head: Ending) -> LiveReference:
        return LiveReference(self.lm, self._big)

    def deltas(self) -> dict[str, Delta]:
        return self._small.deltas()


class Ensemble(Ending):
    """Big model, small model as it was, small model as it is."""

    def __init__(self, big: Ending, small: Ending, base: LiveReference, *, alpha: float, n: int) -> None:
        self._big, self._small, self._base, self._alpha, self._n = big, small, base, alpha, n
        self.module = small.module
        self.chunk = small.chunk // 3
        self._known: dict[bytes, Float[Tensor, "seq d"]] = {}
        self._free = _KEPT
        self._dtypes: list[torch.dtype] = []
        self._asks_on = base.lm.device

    @property
    def vocabulary(self) -> int:
        return self._big.vocabulary

    def __call__(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        own = self._base.lm.d_model
        parts = hidden.split([hidden.shape[-1] - 2 * own, own, own], dim=-1)
        big, base, trained = (part.to(dtype) for part, dtype in zip(parts, self._dtypes, strict=True))
        with torch.no_grad():
            said = self._big(big.to(self._asks_on)).to(hidden.device)
        return offset(said, self._small(trained), self._base.logits(base), alpha=self._alpha, n=self._n)

    def hidden(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq d"]:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids_here, mask_here = ids.to(self._base.lm.device), mask.to(self._base.lm.device)
        base = self._base.hidden("", Batch(ids_here, ids_here, mask_here), "all").view(*ids.shape, -1)
        trained = self._small.hidden(ids_here, mask_here)
        parts = [self._asked(ids, mask).to(base.device), base, trained]
        self._dtypes, self._asks_on = [part.dtype for part in parts], ids.device
        return torch.cat(parts, dim=-1)

    @torch.no_grad()
    def _asked(self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
        """Each row by itself, so that it is the same, whatever it was first met with."""
        rows = [self._row(row[real]) for row, real in zip(ids, mask, strict=True)]
        found = rows[0].new_zeros(*ids.shape, rows[0].shape[-1], device=ids.device)
        for i, row in enumerate(rows):
            found[i, mask[i]] = row.to(ids.device)
        return found

    def _row(self, ids: Int[Tensor, " seq"]) -> Float[Tensor, "seq d"]:
        key = ids.cpu().numpy().tobytes()
        if key in self._known:
            return self._known[key]
        row = self._big.hidden(ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0].cpu()
        if (size := row.numel() * row.element_size()) <= self._free:
            self._known[key], self._free = row, self._free - size
        return row
