"""Next-token logits shifted by what a small model learned: for a model whose weights are out of reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidConfig, ModelNotFound, PatchMismatch
from ..lm import LM, Context
from ..lm.ensemble import Beside, common_vocabulary, offset
from ..lm.locate import is_hooked, root
from ..weights import Delta
from .base import Patch, Switch, check_strength
from .origin import Origin
from .weight import WeightPatch


class Small:
    """The small model as it was before training, o: known by name, and loaded when it is first needed."""

    def __init__(self, name: str, fingerprint: str, lm: LM | None = None) -> None:
        self.name, self.fingerprint, self._lm = name, fingerprint, lm

    @classmethod
    def of(cls, lm: LM) -> Small:
        return cls(lm.name, lm.fingerprint, lm)

    def lm(self, device: torch.device) -> LM:
        """Raises ModelNotFound where its name leads nowhere, PatchMismatch where it leads to another model."""
        if self._lm is None:
            try:
                found = LM.load(self.name, device=device)
            except ModelNotFound as error:
                raise ModelNotFound(
                    f"this patch runs beside {self.name} ({self.fingerprint}), which is not found from here; load it "
                    f"and hand it over: load_patch(folder).beside(small_lm). {error}"
                ) from error
            self._lm = self.same(found)
        return self._lm

    def same(self, lm: LM) -> LM:
        if lm.fingerprint != self.fingerprint:
            raise PatchMismatch(
                f"this patch was trained beside {self.name} ({self.fingerprint}); given: {lm.name} ({lm.fingerprint})"
            )
        return lm


@dataclass(frozen=True, eq=False)
class LogitPatch(Patch):
    """l_e = l_M + strength * alpha * (l_o' - l_o): delta-unlearning (arXiv 2404.11045).

    ``small`` is o, a live model or a ``Small``, and ``deltas`` is what leads from it to its trained copy o'. Both read
    every token that the patched model reads, from o's one set of weights, in which the changed ones are exchanged.
    """

    deltas: Mapping[str, Delta] = field(repr=False)
    small: Small | LM
    _: KW_ONLY
    alpha: float = 1.0
    strength: float = 1.0
    origin: Origin | None = None
    kind = "logit"
    access = "logits"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not 0 <= self.alpha < float("inf"):
            raise InvalidConfig(f"alpha is 0 (no offset) or a positive number; given: {self.alpha}")
        object.__setattr__(self, "deltas", dict(WeightPatch(self.deltas).deltas))
        if isinstance(self.small, LM):
            object.__setattr__(self, "small", Small.of(self.small))

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        """Raises PatchMismatch for a model of another tokenizer and NotExact for an encoder-decoder."""
        switch, alpha = Switch(), self.strength * self.alpha
        if alpha == 0 or not self.deltas:
            yield switch
            return
        small = self._beside.lm(lm.device)
        if small.model is lm.model or (is_hooked(small.model) and root(small.model) is small.model):
            raise InvalidConfig("the small model is a Hugging Face model of its own, beside the one that is patched")
        n, beside = common_vocabulary(lm, small), Beside(small)
        with WeightPatch(self.deltas).on(small) as trained:
            trained.enabled = False

            @torch.no_grad()
            def shift(logits: Tensor, context: Context, kept: int | Tensor) -> tuple[Tensor, Tensor]:
                base = beside.logits("base", context, kept)
                trained.enabled = True
                try:
                    return beside.logits("trained", context, kept), base
                finally:
                    trained.enabled = False

            def edit(logits: Tensor, context: Context, kept: int | Tensor) -> Tensor:
                beside.hear(context)
                if not switch.enabled:
                    return logits
                return offset(logits, *shift(logits, context, kept), alpha=alpha, n=n)

            with lm.edit_logits(edit):
                yield switch

    def beside(self, small: LM) -> LogitPatch:
        """The same patch with its small model handed over. Raises PatchMismatch for another model."""
        known = self._beside
        return replace(self, small=Small(known.name, known.fingerprint, known.same(small)))

    def to(self, dtype: torch.dtype) -> LogitPatch:
        """The same patch held in another dtype, bfloat16 or float32."""
        return replace(self, deltas={name: delta.to(dtype) for name, delta in self.deltas.items()})

    def spec(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "alpha": self.alpha,
            "small": {"name": self._beside.name, "fingerprint": self._beside.fingerprint},
            "deltas": WeightPatch(self.deltas).spec()["deltas"],
        }

    def tensors(self) -> dict[str, Tensor]:
        return WeightPatch(self.deltas).tensors()

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> LogitPatch:
        deltas = WeightPatch.restore(spec, tensors, None).deltas
        return cls(deltas, Small(**spec["small"]), alpha=spec["alpha"], strength=spec["strength"], origin=origin)

    @property
    def n_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(delta.n_parameters for delta in self.deltas.values())

    @property
    def _beside(self) -> Small:
        assert isinstance(self.small, Small)
        return self.small
