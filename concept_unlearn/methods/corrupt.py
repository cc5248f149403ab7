"""Unlearn by corrupting the prompts that a gate flags (embedding-corrupted prompts, ECO: arXiv 2406.07933)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from ..errors import EmptyData
from ..gates import Gate, ProbeGate
from ..lm.oracle import Oracle
from ..lm.score import Scored
from ..patches import PromptPatch
from ..patches.base import Switch
from ..patches.prompt_edits import Corruption
from .base import Method, Study
from .questions import Question, fitted_gate, flagged, forget_questions, journal_of


class Corrupt(Method):
    """Flag, and corrupt with noise that is just strong enough. The model's weights are never touched.

    sigma <- max(start, sigma - lr (f(sigma + eps) - f(sigma - eps)) / width), f being the mean share of the right
    answer among those that are offered, until it falls below ``target``. The width is the distance of the two points
    that f was taken at, also where the lower one is cut off at 0. zero and flip have no sigma: nothing is learned.
    """

    gate: Gate = ProbeGate(alpha=0.01, window=8)
    how: Literal["noise", "zero", "flip"] = "noise"
    n: int | None = Field(None, gt=0)
    """The first so many dimensions; none: all of them."""
    tokens: Literal["flagged", "all"] = "flagged"
    """Those on which a probe gate's own probe exceeds its threshold, or all but the last."""
    start: float = Field(0.1, gt=0)
    """The least sigma, and the first."""
    lr: float = Field(100.0, gt=0)
    eps: float = Field(0.0999, gt=0)
    max_steps: int = Field(10, ge=0)
    target: float = Field(0.27, ge=0, le=1)
    seed: int = 0

    def fit(self, study: Study) -> PromptPatch:
        questions = forget_questions(study.lm, study.scope) if self.how == "noise" else []
        gate, sensor = fitted_gate(study, self.gate)
        above = gate.threshold() if self.tokens == "flagged" and isinstance(gate, ProbeGate) else None

        def guard(sigma: float) -> PromptPatch:
            edit = Corruption(sigma=sigma, how=self.how, n=self.n, above=above, seed=self.seed)
            return PromptPatch(edit=edit, gate=gate, sensor=sensor)

        if self.how != "noise":
            return guard(self.start)
        asked = [q for q in flagged(guard(self.start), study.lm, questions) if q.distractors]
        if not asked:
            raise EmptyData(
                f"no prompt to forget of {study.scope.name!r} comes with a wrong answer, so nothing tells how much "
                "noise is enough: give probes distractors, or use how: zero"
            )
        search = _Search(self, study, guard, asked)
        return replace(guard(search.run()), queries=search.oracle.queries)


class _Search:
    """For a sigma that is enough, and what it has cost so far."""

    def __init__(
        self, method: Corrupt, study: Study, guard: Callable[[float], PromptPatch], asked: Sequence[Question]
    ) -> None:
        self.method, self.lm, self.guard, self.asked = method, study.lm, guard, asked
        self.oracle = Oracle(study.lm, progress=study.progress)
        self.journal = journal_of(method, study, asked)
        self.sigma, self.step, self.done = method.start, 0, False

    def run(self) -> float:
        self._resume()
        while not self.done:
            score, method = self.score(self.sigma), self.method
            self.done = score < method.target or self.step == method.max_steps
            if not self.done:
                self.sigma = max(method.start, next_sigma(self.score, self.sigma, lr=method.lr, eps=method.eps))
                self.step += 1
            self._record(score)
        return self.sigma

    def score(self, sigma: float) -> float:
        """The mean share of the right answer among those that are offered."""
        found = self.oracle.score(
            [q.ids for q in self.asked],
            [q.answers + q.distractors for q in self.asked],
            self.guard(sigma).edits(self.lm, Switch()),
        )
        shares = [_share(group, len(q.answers)) for group, q in zip(found, self.asked, strict=True)]
        return sum(shares) / len(shares)

    def _record(self, score: float) -> None:
        if self.journal is not None:
            notes = {"sigma": self.sigma, "step": self.step, "done": self.done, "queries": self.oracle.queries}
            self.journal.save({"sigma": torch.tensor(self.sigma, dtype=torch.float64)}, notes)
            self.journal.log(self.step, notes | {"score": score})

    def _resume(self) -> None:
        found = self.journal.load() if self.journal is not None else None
        if found is not None:
            notes = found.notes
            self.sigma, self.step, self.done = notes["sigma"], notes["step"], notes["done"]
            self.oracle.queries = notes["queries"]


def next_sigma(f: Callable[[float], float], sigma: float, *, lr: float, eps: float) -> float:
    """Down the slope of f between sigma + eps and sigma - eps, or 0 where that is below it."""
    low, high = max(sigma - eps, 0.0), sigma + eps
    return sigma - lr * (f(high) - f(low)) / (high - low)


def _share(group: Sequence[Scored], n_right: int) -> float:
    """Of the best right answer in what it and the wrong ones are worth, by the geometric mean of their tokens: where
    nothing is known, one over how many that are.
    """
    worth = torch.stack([scored.logprobs.double().mean() for scored in group])
    return float(torch.cat([worth[:n_right].max()[None], worth[n_right:]]).softmax(0)[0])
