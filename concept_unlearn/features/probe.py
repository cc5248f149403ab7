"""A linear probe for whole texts, fitted through the pool that will read it: multiple-instance logistic regression.

A text is in scope because of a few of its tokens. Fitting the pooled score, rather than a score for every token
or for their mean, leaves it to the probe which tokens those are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..gates import SOFTNESS

_ITERATIONS = 60


class Views(NamedTuple):
    """Stretches of a long row of tokens that are to be judged as texts of their own; they may overlap."""

    start: Int[Tensor, " views"]
    stop: Int[Tensor, " views"]
    in_scope: Bool[Tensor, " views"]
    weight: Float[Tensor, " views"]


class Probe(NamedTuple):
    """The score of a token is ``token @ weight + bias``, in nats of log-odds."""

    weight: Float[Tensor, " d"]
    bias: float


def fit_probe(tokens: Float[Tensor, "tokens d"], views: Views, *, pool: str) -> Probe:
    """A minimum, found from zero, of |w|^2 / 2 + sum of weight x cross-entropy of pooled score and ``in_scope``.

    Both classes are given the same total weight. ``mean`` pools as such; anything else as the soft maximum, also
    for a gate that will take the maximum itself, which has no gradient to speak of.
    """
    total = views.weight.sum()
    inside = views.weight[views.in_scope].sum()
    weight = views.weight * total / 2 / torch.where(views.in_scope, inside, total - inside)
    label = views.in_scope.to(tokens.dtype)
    parameters = torch.zeros(tokens.shape[1] + 1, dtype=tokens.dtype, device=tokens.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        w, b = parameters[:-1], parameters[-1]
        pooled = pool_views(tokens @ w, views, pool) + b
        wrong = binary_cross_entropy_with_logits(pooled, label, weight=weight, reduction="sum")
        found: Tensor = wrong + w.square().sum() / 2
        found.backward()
        return found

    with torch.enable_grad():
        optimiser.step(loss)
    found = parameters.detach()
    return Probe(found[:-1], float(found[-1]))


def pool_views(score: Float[Tensor, " tokens"], views: Views, pool: str) -> Float[Tensor, " views"]:
    """What ``ProbeGate(pool=...)`` makes of each view, from running sums in float64."""
    n = views.stop - views.start
    if pool == "mean":
        return (_sums(score.double(), views) / n).to(score.dtype)
    highest = score.detach().max()
    powers = ((score - highest) / SOFTNESS).double().exp()
    return (SOFTNESS * (_sums(powers, views) / n).clamp(min=1e-30).log() + highest).to(score.dtype)


def _sums(values: Float[Tensor, " tokens"], views: Views) -> Float[Tensor, " views"]:
    running = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return running[views.stop] - running[views.start]
