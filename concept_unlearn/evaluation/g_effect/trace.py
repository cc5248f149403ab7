"""The G-effect along a run of unlearning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...component import build
from ...data.scope import Scope
from ...errors import InvalidConfig
from ...lm import LM
from ...lm.head import ending
from ...methods.base import Study
from ...methods.finetune import Finetune
from ...objectives import Objective, RetainNLL
from ...step import LiveReference
from ...training.sharded import is_sharded
from .effects import Gauge, Risks
from .gradients import dot, layers, measuring
from .results import Effect, GEffect, table
from .samples import Estimator, draw

Direction = Literal["gradient", "update"]
UPDATE = "update"
"""What the direction that the optimiser took is called among the objectives."""


def trace_g_effect(
    lm: LM,
    scope: Scope,
    method: Finetune,
    *,
    objectives: Sequence[Objective] | None = None,
    every: int = 5,
    direction: Direction = "gradient",
    risk: Objective = RetainNLL(),
    batches: int = 8,
    batch_size: int = 4,
    seed: int = 0,
    same_batches: bool = False,
    errors: bool = False,
    compat: Literal["paper"] | None = None,
) -> GEffect:
    """``g_effect`` at steps 0, ``every``, 2 ``every``, ... of a run of ``method``, of its own objectives or of others.

    The passages are the same all along, the reference is the model before the run, and what counts are the parameters
    that are trained. The model is as it was afterwards; what the run has made of it is not kept.

    ``direction="update"`` has -(theta_{t+1} - theta_t) / lr for grad L: what the optimiser did with all objectives, on
    its own batches, with its clipping and momentum. These rows are named ``update``.
    """
    if is_sharded():
        raise InvalidConfig("a run whose weights are shared out (FSDP) cannot be looked at on the way")
    if every < 1:
        raise InvalidConfig(f"every is at least 1; given: {every}")
    given = {"batches": batches, "batch_size": batch_size, "max_length": method.max_length, "seed": seed}
    estimator = build(Estimator, given | {"same_batches": same_batches, "errors": errors, "compat": compat})
    measured = () if direction == "update" else method.objectives if objectives is None else tuple(objectives)
    if any(r.reference and r.where == "all" for o in (*measured, risk) for r in o.reads(lm)):
        raise InvalidConfig("along a run the reference is looked up, and what an objective asks of padding cannot be")
    with measuring(lm):
        head = ending(lm.model)
        untouched = LiveReference(lm, head, _as_it_was(head.module))
        drawn = draw(lm, scope, measured, risk, estimator, untouched)
    gauge = Gauge(lm, measured, risk, drawn, estimator)
    run = _Run(gauge, every, direction)
    method.fit(Study(lm, scope), log=run.log, probe=run.probe)
    about = {"scope": scope.name, **gauge.about(), "direction": direction, "method": method.spec()}
    return GEffect(tuple(run.rows), about)


class _Run:
    def __init__(self, gauge: Gauge, every: int, direction: Direction) -> None:
        self.gauge, self.every, self.direction = gauge, every, direction
        self.rows: list[Effect] = []
        self.lr = 0.0
        self.before: _Before | None = None

    def log(self, _: int, values: Mapping[str, float]) -> None:
        """Hears of each step before ``probe`` does."""
        self.lr = values.get("lr", self.lr)

    def probe(self, step: int) -> None:
        if self.before is None and step % self.every:
            return
        with measuring(self.gauge.lm, only_trained=True) as parameters:
            if self.before is not None:
                self.rows += self._update(self.before, parameters)
                self.before = None
            if step % self.every:
                return
            if self.direction == "gradient":
                self.rows += self.gauge.rows(parameters, step)
            else:
                weights = [p.detach().to("cpu", copy=True) for p in parameters]
                self.before = _Before(step, weights, self.gauge.risks(parameters))

    def _update(self, before: _Before, parameters: Sequence[nn.Parameter]) -> Iterable[Effect]:
        layered = layers(self.gauge.lm, parameters)
        went = [(b - p.detach().cpu()) / self.lr for b, p in zip(before.weights, parameters, strict=True)]
        share = torch.stack([layered.sums(dot(risk, went)) for risk in before.risks])
        return table(before.step, UPDATE, layered.names, share[None])


class _Before(NamedTuple):
    step: int
    weights: list[Tensor]
    risks: Risks


def _as_it_was(head: nn.Module) -> Callable[[nn.Module | None], AbstractContextManager[None]]:
    """All that is left to ask the untouched model, once it has been looked up, is to make logits."""
    own = [p.data.clone() for p in head.parameters()]

    @contextmanager
    def as_it_was(only: nn.Module | None) -> Iterator[None]:
        assert only is head, only
        now = [p.data for p in head.parameters()]
        try:
            for p, data in zip(head.parameters(), own, strict=True):
                p.data = data
            yield
        finally:
            for p, data in zip(head.parameters(), now, strict=True):
                p.data = data

    return as_it_was
