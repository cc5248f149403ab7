"""The PG-effect: what each passage by itself would do, and how much an objective makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...component import build
from ...data.scope import Scope
from ...errors import InvalidConfig
from ...lm import LM
from ...objectives import GA, NPO, Objective, RetainNLL
from .effects import Gauge
from .gradients import dot, gradient, measuring_beside, steps
from .samples import Estimator, draw


class Point(NamedTuple):
    passage: int
    """Its place among the scope's forget passages."""
    unlearning: float
    """PG_i(D_u) = <grad R(D_u), grad(-N_i)>."""
    retaining: float
    """PG_i(D_r)."""
    weight: float
    """w_i."""


@dataclass(frozen=True)
class PGEffect:
    """Weights are well placed where the large ones have a first coordinate far below zero and a second one near it."""

    points: tuple[Point, ...]
    settings: Mapping[str, Any]

    @property
    def unlearning(self) -> float:
        """mean_i w_i PG_i(D_u), which is e_u where all tokens of a passage weigh the same, as with NPO."""
        return sum(p.weight * p.unlearning for p in self.points) / len(self.points)

    @property
    def retaining(self) -> float:
        """mean_i w_i PG_i(D_r)."""
        return sum(p.weight * p.retaining for p in self.points) / len(self.points)

    def to_json(self) -> str:
        return json.dumps({"settings": self.settings, "points": [p._asdict() for p in self.points]}, indent=1)


def pg_effect(
    lm: LM,
    scope: Scope,
    objective: Objective = NPO(),
    *,
    risk: Objective = RetainNLL(),
    batches: int = 8,
    batch_size: int = 4,
    max_length: int = 512,
    seed: int = 0,
    same_batches: bool = False,
    reference: LM | None = None,
) -> PGEffect:
    """A point for each passage that ``g_effect`` with these settings would evaluate the objective on.

    w_i is read off the objective, -dL/dN_i times the number of passages: NPO's own weight where it is NPO, one number
    for all with GA, the mean over its tokens where they differ, and 1 where the NLL is not what L is made of.
    """
    reads = objective.reads(lm)
    if objective.retains or any(r.split.startswith("retain") for r in reads):
        raise InvalidConfig(f"a point is a passage to be forgotten, and {objective.kind} reads what is to be retained")
    given = {"batches": batches, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    estimator = build(Estimator, given | {"same_batches": same_batches})
    points = []
    with measuring_beside(lm, reference) as (parameters, untouched):
        drawn = draw(lm, scope, [objective, GA()], risk, estimator, untouched, batch_size=1)
        gauge = Gauge(lm, [objective], risk, drawn, estimator)
        risks = gauge.risks(parameters)
        ((_, _, sample),) = drawn.groups
        for passage, step in zip(sample.items["forget"], steps(lm, gauge.head, [objective, GA()], sample), strict=True):
            c = step.nll("forget")
            (push,) = torch.autograd.grad(objective(step), c, retain_graph=True, allow_unused=True)
            weight = 1.0 if push is None else float(-push.mean() * step.n_sequences("forget"))
            g = gradient(-c.sum(), parameters)
            unlearning, retaining = (float(dot(r, g).sum()) for r in risks)
            points.append(Point(passage, unlearning, retaining, weight))
    return PGEffect(tuple(points), {"scope": scope.name, **gauge.about()})
