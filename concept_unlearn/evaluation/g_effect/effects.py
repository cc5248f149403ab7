"""The G-effect: what a step down an objective does to the loss on forgotten and on retained text, layer by layer.

Wang et al. 2025 (arXiv 2502.19301): e = <grad R(D), grad L>. One gradient step of size eta changes R by -eta e to first
order, so the unlearning effect e_u (D forgotten) should be far below zero, and the retaining effect e_r (D retained)
not be below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...component import build
from ...data.scope import Scope
from ...errors import InvalidConfig
from ...lm import LM
from ...lm.head import Ending, ending
from ...objectives import Objective, RetainNLL
from .gradients import Gradient, Layers, Take, add_, dot, gradients, layers, measuring_beside, zeros
from .results import Effect, GEffect, table
from .samples import Drawn, Estimator, Group, Sample, draw


def g_effect(
    lm: LM,
    scope: Scope,
    objective: Objective | Sequence[Objective],
    *,
    risk: Objective = RetainNLL(),
    batches: int = 8,
    batch_size: int = 4,
    max_length: int = 512,
    seed: int = 0,
    same_batches: bool = False,
    errors: bool = True,
    reference: LM | None = None,
    compat: Literal["paper"] | None = None,
) -> GEffect:
    """The effects of one or several objectives on the model as it is now, which is left exactly as it is.

    R is ``risk``, the mean NLL of a token by default, on ``batches`` x ``batch_size`` forgotten and on as many retained
    passages; L is each objective alone, without its weight, on others (fewer of both where the scope has too few).
    ``same_batches`` takes the same, which pushes e_u away from zero by the variance of the gradient. The counts
    decide which passages are read, the batches only how many at a time, and how ``errors`` are estimated.

    ``reference`` is the untouched model where this one no longer is. ``compat="paper"`` does as the authors' code:
    the same batches, each a step of its own, and each gradient smoothed over them, 0.6 old + 0.4 new.

    Time: a forward pass for each batch of each R and of L, a backward pass for each batch of each R and of each
    objective; ``errors`` takes the passes of R twice. Memory, beside the model and on the CPU: two gradients and one
    at hand, and with ``errors`` one for each objective.
    """
    objectives = (objective,) if isinstance(objective, Objective) else tuple(objective)
    given = {"batches": batches, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    estimator = build(Estimator, given | {"same_batches": same_batches, "errors": errors, "compat": compat})
    with measuring_beside(lm, reference) as (parameters, untouched):
        gauge = Gauge(lm, objectives, risk, draw(lm, scope, objectives, risk, estimator, untouched), estimator)
        rows = gauge.rows(parameters)
    return GEffect(tuple(rows), {"scope": scope.name, **gauge.about()})


class Risks(NamedTuple):
    """grad R on forgotten and on retained text."""

    forget: list[Tensor]
    retain: list[Tensor]


class Gauge:
    """Measures at the weights of the moment, on passages that stay."""

    def __init__(
        self, lm: LM, objectives: Sequence[Objective], risk: Objective, drawn: Drawn, estimator: Estimator
    ) -> None:
        self.lm, self.objectives, self.risk, self.drawn, self.estimator = lm, objectives, risk, drawn, estimator
        self.errors = estimator.errors and estimator.compat is None
        self.labels = [label(o) for o in objectives]
        if len(set(self.labels)) < len(self.labels):
            raise InvalidConfig(f"the same objective is given twice: {', '.join(self.labels)}")

    @cached_property
    def head(self) -> Ending:
        return ending(self.lm.model)

    def about(self) -> dict[str, Any]:
        """What was measured, and of which passages, by their places among those of the side."""
        read = [s.items for s in (self.drawn.forget, self.drawn.retain)], [g.sample.items for g in self.drawn.groups]
        of_risk, of_objectives = ({side: list(own) for s in several for side, own in s.items()} for several in read)
        return {
            "model": self.lm.name,
            "objectives": {name: o.spec() for name, o in zip(self.labels, self.objectives, strict=True)},
            "risk": self.risk.spec(),
            "passages": {"risk": of_risk, "objectives": of_objectives},
            **self.estimator.model_dump(exclude={"batches"}),
        }

    def risks(self, parameters: Sequence[nn.Parameter]) -> Risks:
        return Risks(*(self._risk(sample, parameters) for sample in (self.drawn.forget, self.drawn.retain)))

    def rows(self, parameters: Sequence[nn.Parameter], step: int = 0) -> list[Effect]:
        layered, risks = layers(self.lm, parameters), self.risks(parameters)
        means = [zeros(parameters) if self.errors else [] for _ in self.objectives]
        shares: dict[int, dict[int, Tensor]] = {i: {} for i in range(len(self.objectives))}
        for group in self.drawn.groups:
            by = self.estimator.smoothing(len(group.sample.batches))

            def take(j: int, i: int, g: Gradient, group: Group = group, by: Sequence[float] = by) -> None:
                i = group.indices[i]
                shares[i][j] = by[j] * torch.stack([layered.sums(dot(risk, g)) for risk in risks])
                if self.errors:
                    add_(means[i], g)

            self._gradients(group.objectives, group.sample, parameters, take)
        del risks
        of_risk = self._risk_shares(parameters, means, layered) if self.errors else None
        found: list[Effect] = []
        for i, name in enumerate(self.labels):
            of_objective = torch.stack([shares[i][j] for j in sorted(shares[i])])
            found += table(
                step, name, layered.names, of_objective, None if of_risk is None else of_risk[i], self.estimator.same
            )
        return found

    def _risk(self, sample: Sample, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        total, by = zeros(parameters), self.estimator.smoothing(len(sample.batches))
        self._gradients([self.risk], sample, parameters, lambda j, _, g: add_(total, g, by[j]))
        return total

    def _risk_shares(
        self, parameters: Sequence[nn.Parameter], means: Sequence[Sequence[Tensor]], layered: Layers
    ) -> list[list[Tensor]]:
        """For each objective, and for R on forgotten and on retained text: what each batch of R gives to e."""
        found: list[list[list[Tensor]]] = [[[], []] for _ in means]
        for k, sample in enumerate((self.drawn.forget, self.drawn.retain)):

            def take(_: int, __: int, g: Gradient, k: int = k) -> None:
                for mine, mean in zip(found, means, strict=True):
                    mine[k].append(layered.sums(dot(mean, g)))

            self._gradients([self.risk], sample, parameters, take)
        return [[torch.stack(shares) for shares in mine] for mine in found]

    def _gradients(
        self, objectives: Sequence[Objective], sample: Sample, parameters: Sequence[nn.Parameter], take: Take
    ) -> None:
        gradients(self.lm, self.head, objectives, sample, parameters, take, apart=self.estimator.compat == "paper")


def label(objective: Objective) -> str:
    """The kind, and what is not as by default."""
    usual = type(objective).model_fields
    special = [f"{k}={v}" for k, v in objective if k != "weight" and v != usual[k].default]
    return f"{objective.kind}({', '.join(special)})" if special else objective.kind
