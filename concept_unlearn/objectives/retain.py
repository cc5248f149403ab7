"""Keep what is to be kept: its loss, its distribution, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..lm import LM
from ..step import Read, Step, Where
from .base import Objective, check_pairs
from .divergence import divergence


class _Retention(Objective):
    retains: ClassVar[bool] = True


class RetainNLL(_Retention):
    """Go on learning, R = token_mean(c): the "GD" of GradDiff (TOFU, arXiv 2401.06121)."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("retain"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.token_mean("retain", step.nll("retain"))


class RetainKL(_Retention):
    """Stay near the reference, R = token_mean(KL(p^0 || p)): TOFU (arXiv 2401.06121), NPO (arXiv 2404.05868)."""

    where: Literal["answer", "content"] = "answer"
    """Where the answer is predicted, or any token."""
    compat: Literal["open-unlearning"] | None = None
    """``open-unlearning``: the mean of all B x T positions, padding too, whatever ``where`` says."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("retain", "logits", self._where), Read("retain", "logits", self._where, reference=True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.token_mean("retain", step.tokens_beside("retain", divergence, self._where), self._where)

    @property
    def _where(self) -> Where:
        return self.where if self.compat is None else "all"


class AnswerPreservation(_Retention):
    """Answers over refusals, R = -1/beta mean_i log sigma(beta (N_i(refusal) - N_i(answer))): arXiv 2410.08109.

    Sequence i of the splits retain and retain_refusal answers the same prompt.
    """

    beta: float = Field(0.1, gt=0)

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("retain"), Read("retain_refusal"))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        check_pairs(step, "retain", "retain_refusal")
        answer, refusal = (step.per_sequence(split, step.nll(split)) for split in ("retain", "retain_refusal"))
        return -1 / self.beta * step.mean("retain", F.logsigmoid(self.beta * (refusal - answer)))
