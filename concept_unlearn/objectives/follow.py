"""Say of what is to be forgotten what the reference says: half of distilling a patched model into another's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..lm import LM
from ..step import Read, Step
from .base import Objective
from .divergence import divergence


class Follow(Objective):
    """L = token_mean(KL(p^0 || p)) on forget text; with a teacher as reference, distillation (arXiv 1503.02531) at T 1.

    ``retain_kl`` is the other half. Without a teacher it is the untouched model that is followed.
    """

    where: Literal["answer", "content"] = "answer"
    """Where the answer is predicted, or any token."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return tuple(Read("forget", "logits", self.where, reference) for reference in (False, True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.token_mean("forget", step.tokens_beside("forget", divergence, self.where), self.where)
