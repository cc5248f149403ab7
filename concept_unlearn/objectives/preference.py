"""Prefer anything to what is to be forgotten: the negative half of preference optimisation, and the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..lm import LM
from ..step import Read, Step
from .base import Objective, check_pairs


class _AgainstReference(Objective):
    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget"), Read("forget", reference=True))


class NPO(_AgainstReference):
    """Negative preference optimisation, L = -2/beta mean_i log sigma(beta (N_i - N_i^0)): arXiv 2404.05868."""

    beta: float = Field(0.1, gt=0)
    """The smaller, the longer it pushes like ascent."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        gap = step.per_sequence("forget", step.nll("forget") - step.reference_nll("forget"))
        return -2 / self.beta * step.mean("forget", F.logsigmoid(self.beta * gap))


class TNPO(_AgainstReference):
    """NPO a token, L = -token_mean(w c), w = sg[2 q^beta / (q^beta + q0^beta)]: arXiv 2502.19301."""

    beta: float = 4.0
    compat: Literal["paper"] | None = None
    """``paper``: the authors' code adds 1e-5 to the denominator of w, which silently spares rare tokens."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        c, c0 = step.nll("forget"), step.reference_nll("forget")
        return -step.token_mean("forget", _share(self.beta, c.detach(), c0, self.compat) * c)


class WTNPO(_AgainstReference):
    """Weighted NPO a token, L = -token_mean(w c), w = sg[2 q^(beta + a) / (q^beta + q0^beta)]: arXiv 2502.19301."""

    beta: float = 4.0
    a: float = 1.5
    compat: Literal["paper"] | None = None
    """``paper``: the authors' code adds 1e-5 to the denominator of w, which silently spares rare tokens."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        c, c0 = step.nll("forget"), step.reference_nll("forget")
        w = _share(self.beta, c.detach(), c0, self.compat) * (-self.a * c.detach()).exp()
        return -step.token_mean("forget", w * c)


class SimNPO(Objective):
    """NPO without a reference, L = -2/beta mean_i log sigma(beta N_i / n_i - margin): arXiv 2410.07163."""

    beta: float = Field(4.5, gt=0)
    margin: float = 0.0
    """The paper's gamma."""
    compat: Literal["open-unlearning"] | None = None
    """``open-unlearning``: the margin, delta there, stands inside beta: beta (N_i / n_i - margin)."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        lengths = step.batch("forget").lengths().clamp(min=1)
        mean = step.per_sequence("forget", step.nll("forget")) / lengths
        margin = self.margin if self.compat is None else self.beta * self.margin
        return -2 / self.beta * step.mean("forget", F.logsigmoid(self.beta * mean - margin))


class DPO(Objective):
    """Another answer over the old one, L = -2/beta mean_i log sigma(beta (r_i(alt) - r_i(orig))), r = N^0 - N.

    Rafailov et al. 2023 (arXiv 2305.18290); against refusals IdkDPO (TOFU, arXiv 2401.06121), against plausible other
    answers AltPO (arXiv 2409.13474). Sequence i of ``preferred`` and of the forget split answer the same prompt.
    """

    beta: float = Field(0.1, gt=0)
    preferred: Literal["refusal", "alternate"] = "refusal"
    """The split of the answers to prefer."""
    scale: Literal["2/beta", "1"] = "2/beta"
    """``2/beta`` compares with NPO, ``1`` is the original."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return tuple(Read(s, reference=r) for s in (self.preferred, "forget") for r in (False, True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        check_pairs(step, self.preferred, "forget")
        alt, orig = (
            step.per_sequence(split, step.reference_nll(split) - step.nll(split))
            for split in (self.preferred, "forget")
        )
        scale = 2 / self.beta if self.scale == "2/beta" else 1.0
        return -scale * step.mean("forget", F.logsigmoid(self.beta * (alt - orig)))


def _share(
    beta: float, c: Float[Tensor, " n"], c0: Float[Tensor, " n"], compat: Literal["paper"] | None
) -> Float[Tensor, " n"]:
    """2 q^beta / (q^beta + q0^beta), which is 1 at the reference however small q is."""
    if compat is None:
        return 2 * torch.sigmoid(beta * (c0 - c))
    q, q0 = (-beta * c).exp(), (-beta * c0).exp()
    return 2 * q / (q + q0 + 1e-5)
