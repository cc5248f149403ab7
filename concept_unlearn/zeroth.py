"""Descent without a gradient: one is estimated from values alone (BAR, arXiv 2007.08714, equation 6).

    one-sided    g = 1/Q sum_j b (f(w + beta u_j) - f(w)) / beta u_j
    two-sided    g = 1/Q sum_j b (f(w + beta u_j) - f(w - beta u_j)) / (2 beta) u_j

u_j is uniform on the unit sphere of R^d. With b = d the estimate of a linear f is unbiased, with b = 1 it is a d-th of
that. One side errs by O(beta), two by O(beta^2).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from .component import Frozen
from .errors import InvalidConfig, NonFinite

Values = Callable[[Float[Tensor, "points ..."]], Float[Tensor, " points"]]
"""f, at several points."""


class Estimate(NamedTuple):
    gradient: Float[Tensor, "*shape"]
    value: float
    """The mean of f over the points that it was asked at."""


class Zeroth(Frozen):
    """How to go down a function that gives values only: fields that a method takes over as its own."""

    q: int = Field(16, gt=0)
    """Directions of an estimate."""
    beta: float = Field(0.01, gt=0)
    """Length of a probing step."""
    sides: Literal[1, 2] = 2
    unbiased: bool = True
    """b = d; otherwise b = 1."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """It is given the estimate, where the authors' code computes the estimate and gives it the true gradient."""
    lr: float = Field(0.05, gt=0)
    decay: float = Field(0.1, gt=0, le=1)
    """What is left of the learning rate in the end; it falls exponentially."""
    batch_size: int = Field(4, gt=0)
    """Prompts of each kind at which an estimate asks for f."""
    budget: int = Field(20000, gt=0)
    """The most queries that may be spent, whatever they are spent on."""
    seed: int = 0


@dataclass(frozen=True)
class Walk:
    """Where a descent stands: all that going on from there takes."""

    w: Float[Tensor, "*shape"]
    first: Float[Tensor, "*shape"]
    """Adam's running mean of the estimates."""
    second: Float[Tensor, "*shape"]
    """And of their squares."""
    step: int = 0

    @classmethod
    def start(cls, w: Tensor) -> Walk:
        return cls(w, torch.zeros_like(w), torch.zeros_like(w))


_BETAS, _EPS = (0.9, 0.999), 1e-8


def directions(n: int, like: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """Uniform on the unit sphere of everything that ``like`` holds."""
    drawn = torch.randn(n, like.numel(), generator=generator, dtype=torch.float64)
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    found: Tensor = drawn.to(like).reshape(n, *like.shape)
    return found


def estimate(
    f: Values,
    w: Float[Tensor, "*shape"],
    u: Float[Tensor, "q ..."],
    *,
    beta: float,
    sides: Literal[1, 2] = 2,
    unbiased: bool = True,
) -> Estimate:
    """Asks for f at 2 Q points, or at Q + 1."""
    values = f(torch.cat([w + beta * u, w - beta * u if sides == 2 else w[None]])).double()
    ahead, behind = values[: len(u)], values[len(u) :]
    slope = (ahead - behind) / (beta * sides)
    weight = slope * ((w.numel() if unbiased else 1) / len(u))
    return Estimate(torch.tensordot(weight.to(u), u, dims=1), float(values.mean()))


def n_queries(batch: int, q: int, sides: Literal[1, 2]) -> int:
    """Of one estimate, each point of which asks about a batch of prompts."""
    return batch * (2 * q if sides == 2 else q + 1)


def descend(
    f: Callable[[Float[Tensor, "points ..."], int], Float[Tensor, " points"]],
    walk: Walk,
    settings: Zeroth,
    *,
    cost: int,
    spent: Callable[[], int],
    each: Callable[[Walk, float], None] | None = None,
) -> Walk:
    """Down ``f(points, step)`` for as long as the budget pays for whole estimates.

    ``cost`` is what one takes, ``spent()`` what was spent so far: the client counts, not the descent. ``each`` hears of
    every step and the mean value on the way. Raises InvalidConfig where the budget pays for none, NonFinite.
    """
    n_steps = walk.step + (settings.budget - spent()) // cost
    if not walk.step:
        check_budget(settings, cost=cost, spent=spent())
    while spent() + cost <= settings.budget:
        u = directions(settings.q, walk.w, _generator(settings.seed, walk.step))
        here = _at(f, walk.step)
        found = estimate(here, walk.w, u, beta=settings.beta, sides=settings.sides, unbiased=settings.unbiased)
        if not found.gradient.isfinite().all():
            raise NonFinite(f"the loss of step {walk.step + 1} is NaN or infinite: try a lower lr or beta")
        walk = _moved(walk, found.gradient, settings, n_steps)
        if each:
            each(walk, found.value)
    return walk


def _at(f: Callable[[Tensor, int], Tensor], step: int) -> Values:
    return lambda points: f(points, step)


def check_budget(settings: Zeroth, *, cost: int, spent: int) -> None:
    """Raises InvalidConfig where what is left does not pay for one estimate."""
    if spent + cost > settings.budget:
        raise InvalidConfig(
            f"a budget of {settings.budget} queries does not pay for one estimate, which takes {cost} after "
            f"{spent} to begin with: raise budget, or lower q or batch_size"
        )


def _moved(walk: Walk, gradient: Tensor, settings: Zeroth, n_steps: int) -> Walk:
    lr = settings.lr * settings.decay ** (walk.step / max(n_steps - 1, 1))
    if settings.optimiser == "sgd":
        return Walk(walk.w - lr * gradient, walk.first, walk.second, walk.step + 1)
    t, (b1, b2) = walk.step + 1, _BETAS
    first = b1 * walk.first + (1 - b1) * gradient
    second = b2 * walk.second + (1 - b2) * gradient.square()
    change = (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + _EPS)
    return Walk(walk.w - lr * change, first, second, t)


def _generator(seed: int, step: int) -> torch.Generator:
    """Of one step, so that a descent that was stopped draws what it would have drawn."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(63))
