"""Raise the loss on what is to be forgotten: gradient ascent, weighted, bounded, selective or tempered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from ..lm import LM
from ..step import Read, Step
from .base import Objective


class _Ascent(Objective):
    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget"),)


class GA(_Ascent):
    """Gradient ascent, L = -token_mean(c): Jang et al. 2022 (arXiv 2210.01504), TOFU (arXiv 2401.06121)."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return -step.token_mean("forget", step.nll("forget"))


class WGA(_Ascent):
    """Ascent weighted by confidence, L = -token_mean(w c), w = sg[q^beta]: Wang et al. 2025 (arXiv 2502.19301)."""

    beta: float = 1.0

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        c = step.nll("forget")
        return -step.token_mean("forget", (-self.beta * c.detach()).exp() * c)


class SatImp(_Ascent):
    """Saturation and importance, L = -token_mean(w c), w = sg[q^beta1 (1 - q)^beta2]: arXiv 2505.11953."""

    beta1: float = 5.0
    beta2: float = Field(1.0, ge=0)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        c = step.nll("forget")
        known = c.detach()
        w = (-self.beta1 * known).exp() * (-torch.expm1(-known)) ** self.beta2
        return -step.token_mean("forget", w * c)


class Hinge(_Ascent):
    """Controlled ascent, L = mean over S of (delta - N_i), S = sg{i : N_i < delta}: arXiv 2406.09179, version 1."""

    counts: ClassVar[bool] = True

    delta: float = 6.0
    """A sequence is left alone from here on. Published: 2 in the code, 6 in its instructions."""
    score: Literal["sum", "mean"] = "sum"
    """What is compared with delta: N_i, or N_i / n_i, which is fair to long answers."""
    normalise: Literal["active", "batch"] = "active"
    """Divide by the number of sequences in S, or by all: then the push fades as fewer are left."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        n, lengths = step.n_sequences("forget"), step.batch("forget").lengths()
        score = step.per_sequence("forget", step.nll("forget"))
        if self.score == "mean":
            score = score / lengths.clamp(min=1)
        active = (score.detach() < self.delta) & (lengths > 0)
        if self.normalise == "active":
            n = step.agree(repr(self), active.sum()).clamp(min=1)
        return torch.where(active, self.delta - score, 0.0).sum() / n


class CappedGA(_Ascent):
    """Ascent on the likeliest share ``keep`` of each answer, L = -mean of its c: arXiv 2406.09179, version 2."""

    keep: float = Field(0.8, gt=0, le=1)
    """k_i = max(1, floor(keep n_i)) tokens of lowest c; the first of equals."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        c, owner, place = step.nll("forget"), step.owner("forget"), step.order("forget")
        rank = torch.empty_like(place)
        likeliest = c.detach().argsort(stable=True)
        rank[likeliest[owner[likeliest].argsort(stable=True)]] = place
        kept = rank < self._k(step.batch("forget").lengths())[owner]
        return -torch.where(kept, c, 0.0).sum() / step.total("forget", lambda b: self._k(b.lengths()).sum())

    def _k(self, n: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        k = (self.keep * n.cpu().double() + 1e-9).long()  # in float32 1e-9 would be lost
        return k.to(n.device).clamp(min=1).minimum(n)


class TemperatureGA(Objective):
    """Ascent on a softened loss, L = -token_mean(CE(z / T, y)): arXiv 2406.09179, version 2."""

    temperature: float = Field(2.0, gt=0)

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", "logits"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        def tempered(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z / self.temperature, y, reduction="none")

        return -step.token_mean("forget", step.tokens("forget", tempered))
