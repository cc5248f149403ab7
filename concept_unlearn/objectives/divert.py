"""Give the model something else to say: a refusal, everything alike, or itself without the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from ..lm import LM
from ..step import UNSUPERVISED, Read, Step, Where
from .base import Objective


class IDK(Objective):
    """Learn to refuse, L = token_mean(c) of (forget question, refusal): PO of TOFU (arXiv 2401.06121)."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("refusal"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.token_mean("refusal", step.nll("refusal"))


class ME(Objective):
    """Maximal entropy on question and answer, L = seq_mean(KL(p || U)), U uniform: arXiv 2410.08109."""

    direction: Literal["model_to_uniform", "uniform_to_model"] = "model_to_uniform"
    """KL(p || U), or KL(U || p), which is far steeper where p is near 0."""
    reduction: Literal["seq_mean", "token_mean"] = "seq_mean"
    compat: Literal["paper"] | None = None
    """``paper``: what the authors' code computes, uniform_to_model and token_mean, whatever is asked above. It scores
    padding as well, which is left out."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", "logits", "content"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        direction, reduction = (
            (self.direction, self.reduction) if self.compat is None else ("uniform_to_model", "token_mean")
        )

        def divergence(z: Tensor, _: Tensor) -> Tensor:
            log_p = z.log_softmax(-1)
            if direction == "uniform_to_model":
                return -math.log(z.shape[-1]) - log_p.mean(-1)
            return math.log(z.shape[-1]) + (log_p.exp() * log_p).sum(-1)

        reduce = step.seq_mean if reduction == "seq_mean" else step.token_mean
        return reduce("forget", step.tokens("forget", divergence, "content"), "content")


class UNDIAL(Objective):
    """Learn from oneself with the answer lowered, L = token_mean(CE(t, p)), t = sg[softmax(z^0 - beta onehot(y))].

    Dong et al. 2024 (arXiv 2402.10052).
    """

    beta: float = 10.0
    """By how much the answer's logit is lowered. Published: 3, 10, 30."""
    compat: Literal["open-unlearning"] | None = None
    """``open-unlearning``: the mean of all positions, those of the prompt and padding too, where the label -100 lowers
    entry V - 100 of the vocabulary."""

    def reads(self, lm: LM) -> Sequence[Read]:
        where: Where = "answer" if self.compat is None else "all"
        return (Read("forget", "logits", where), Read("forget", "logits", where, reference=True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        if self.compat is not None:
            return self._everywhere(step)
        return step.token_mean("forget", step.tokens_beside("forget", self._distil))

    def _distil(self, z: Tensor, z0: Tensor, y: Tensor) -> Float[Tensor, " n"]:
        return F.cross_entropy(z, _lowered(z0, y, self.beta).softmax(-1), reduction="none")

    def _everywhere(self, step: Step) -> Float[Tensor, ""]:
        def unlabelled(z: Tensor, z0: Tensor, y: Tensor) -> Tensor:
            return self._distil(z, z0, torch.full_like(y, UNSUPERVISED % z.shape[-1]))

        answer = step.batch("forget").positions("answer")
        values = torch.where(
            answer.flatten(),
            step.tokens_beside("forget", self._distil, "all"),
            step.tokens_beside("forget", unlabelled, "all"),
        )
        predicting = values.view(answer.shape)[:, :-1]  # the last position predicts nothing
        return predicting.sum() / step.total("forget", lambda b: b.positions("all")[:, 1:].sum())


class CEU(Objective):
    """Cross-entropy unlearning, L = token_mean(CE(t, p)), t = sg[softmax(z with z_y = -inf)]: arXiv 2503.01224."""

    skip: int = Field(1, ge=0)
    """m: this many tokens at the beginning of each answer are left alone."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", "logits"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        def without(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, _lowered(z.detach(), y, math.inf).softmax(-1), reduction="none")

        values = torch.where(step.order("forget") >= self.skip, step.tokens("forget", without), 0.0)
        return values.sum() / step.total("forget", lambda b: (b.lengths() - self.skip).clamp(min=0).sum())


class Margin(Objective):
    """Flat logits, L = token_mean((max_v z_v - mean_v z_v)^2): the forgetting term of PDU (arXiv 2506.05314)."""

    compat: Literal["open-unlearning"] | None = None
    """``open-unlearning``: the answer tokens' own positions instead of those that predict them."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", "logits", self._where),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        values = step.tokens("forget", lambda z, _: (z.amax(-1) - z.mean(-1)) ** 2, self._where)
        return step.token_mean("forget", values, self._where)

    @property
    def _where(self) -> Where:
        return "answer" if self.compat is None else "own"


def _lowered(z: Float[Tensor, "n vocab"], y: Int[Tensor, " n"], by: float) -> Float[Tensor, "n vocab"]:
    """z - by onehot(y), also where ``by`` is infinite."""
    return z.scatter_add(-1, y[:, None], z.new_full((len(y), 1), -by))
