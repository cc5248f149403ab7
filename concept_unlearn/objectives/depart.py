"""Go away from what the model says now."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from ..lm import LM
from ..step import Read, Step
from .base import Objective
from .divergence import divergence


class Depart(Objective):
    """Away from the reference, L = -token_mean(min(KL(p^0 || p), kappa)), kappa = ln V: EUL (arXiv 2310.20150).

    A token that is that far has no gradient any more; the paper's has no such bound. At the reference itself the
    gradient is zero, so it takes another term to set out.
    """

    kappa: float | None = None
    """In nats; None: ln V, what guessing is away from being certain."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", "logits"), Read("forget", "logits", reference=True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        def departure(z: Tensor, z0: Tensor, _: Tensor) -> Tensor:
            kappa = math.log(z.shape[-1]) if self.kappa is None else self.kappa
            return divergence(z, z0).clamp(max=kappa)

        return -step.token_mean("forget", step.tokens_beside("forget", departure))
