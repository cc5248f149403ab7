"""Unlearn a model that only answers: embeddings of a guarded prompt, learned from probabilities alone.

Black-box Adversarial Reprogramming (arXiv 2007.08714) turned to unlearning. No backward pass, no weight is read.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from ..data.encode import encode_text
from ..gates import Gate, ProbeGate
from ..lm.oracle import Oracle
from ..patches import PromptPatch
from ..patches.base import Switch
from ..patches.prompt_edits import Vectors
from ..training.rows import order
from ..zeroth import Walk, Zeroth, check_budget, descend, directions, n_queries
from .base import Method, Study
from .embedded import embedded, principal, root_mean_square
from .questions import fitted_gate, flagged, forget_questions, journal_of, retain_questions
from .refusing import Labels, Refusing, divergence, n_preparing, refusal_texts, refusing

MAX_RETAIN = 64
"""Prompts to keep that the gate lets through, evenly spread over those there are."""
_EVERY = 10
"""Steps from one checkpoint to the next."""


class BlackBox(Method, Zeroth, Labels):
    """Learn vectors, added to the embeddings of flagged prompts, that turn answers into refusals.

    Goes down L, see ``Labels``, over those prompts alone that the gate lets through: no other will ever meet the
    vectors. Probing steps and vectors are in units of the embeddings' root mean square. With a study's folder it goes
    on from its last checkpoint.
    """

    k: PositiveInt | Literal["all"] = 4
    """Vectors, each for one of the first tokens of the prompt's text; ``all``: a single one, for every token of it."""
    gate: Gate = ProbeGate(alpha=0.01, window=8)
    rank: int | None = Field(None, gt=0)
    """Search only this many principal components of the embeddings of refusals and of the prompts to forget, in which a
    step of length 1 is one embedding's; none: every dimension, of which few queries see next to nothing."""
    start: float = Field(0.0, ge=0)
    """Begin at so many times the mean embedding of the refusals' tokens."""
    direction: Literal["learned", "random"] = "learned"
    """``random`` is the control: vectors of the learned ones' sizes that point anywhere."""

    def fit(self, study: Study) -> PromptPatch:
        asking = _Asking(self, study)
        edit = asking.edit(asking.run().w)
        if self.direction == "random":
            generator = torch.Generator().manual_seed(self.seed)
            anywhere = directions(len(edit.vectors), edit.vectors[0], generator)
            edit = Vectors(anywhere * edit.vectors.norm(dim=1, keepdim=True), edit.where)
        return PromptPatch(edit=edit, gate=asking.gate, sensor=asking.sensor, queries=asking.oracle.queries)


class _Asking:
    """One fit: which prompts are asked about, what has been paid for, how good a point is."""

    def __init__(self, method: BlackBox, study: Study) -> None:
        self.method, self.lm, lm = method, study.lm, study.lm
        questions = forget_questions(lm, study.scope)
        self.gate, self.sensor = fitted_gate(study, method.gate)
        guard = PromptPatch(edit=Vectors(torch.zeros(1, lm.d_model)), gate=self.gate, sensor=self.sensor)
        self.forget = flagged(guard, lm, questions)
        kept = flagged(guard, lm, retain_questions(lm, study.scope), needed=False)
        self.retain = kept[:: max(math.ceil(len(kept) / MAX_RETAIN), 1)]
        self.n_forget = min(method.batch_size, len(self.forget))
        self.n_retain = min(method.batch_size, len(self.retain)) if method.retain_weight else 0
        self.oracle = Oracle(lm, progress=study.progress)
        self.journal = journal_of(method, study, [*self.forget, *self.retain])
        check_budget(method, cost=self._cost, spent=self._preparation)
        prompts = embedded(lm, [q.ids for q in self.forget])
        self.scale = root_mean_square(prompts)
        self.basis, self.origin = self._searched(prompts)
        self.asked, self.before, self.walk = self._resumed() or self._begun()

    def run(self) -> Walk:
        walk = descend(
            self.loss, self.walk, self.method, cost=self._cost, spent=lambda: self.oracle.queries, each=self._record
        )
        self._checkpoint(walk)
        return walk

    def edit(self, w: Float[Tensor, "k dims"]) -> Vectors:
        inside = w if self.basis is None else self.lm.d_model**0.5 * (w @ self.basis)
        return Vectors(self.scale * inside + self.origin, "all" if self.method.k == "all" else "first")

    def loss(self, points: Float[Tensor, "points k dims"], step: int) -> Float[Tensor, " points"]:
        forget = self._drawn(len(self.forget), self.n_forget, step)
        kept = self._drawn(len(self.retain), self.n_retain, step)
        prompts = [q.ids for q in (*(self.forget[i] for i in forget), *(self.retain[i] for i in kept))]
        values = []
        for w in points:
            edits = PromptPatch(edit=self.edit(w)).edits(self.lm, Switch())
            p = self.oracle.probabilities(prompts, edits)
            value = self.asked.loss(p[: len(forget)], forget, self.method).mean()
            if kept:
                value = value + self.method.retain_weight * divergence(self.before[kept], p[len(forget) :]).mean()
            values.append(value)
        return torch.stack(values)

    @property
    def _cost(self) -> int:
        return n_queries(self.n_forget + self.n_retain, self.method.q, self.method.sides)

    @property
    def _preparation(self) -> int:
        return (len(self.retain) if self.n_retain else 0) + n_preparing(self.method, len(self.forget))

    def _searched(self, prompts: Float[Tensor, "tokens d"]) -> tuple[Tensor | None, Float[Tensor, " d"]]:
        """The directions of the search, and the vector that it begins at. Costs no query."""
        if self.method.rank is None and not self.method.start:
            return None, torch.zeros(self.lm.d_model)
        refusals = embedded(self.lm, [encode_text(self.lm.tokenizer, text) for text in refusal_texts()])
        basis = None if self.method.rank is None else principal([refusals, prompts], self.method.rank)
        return basis, self.method.start * refusals.mean(0)

    def _begun(self) -> tuple[Refusing, Tensor, Walk]:
        asked = refusing(self.lm, self.oracle, self.method, self.forget)
        before = self.oracle.probabilities([q.ids for q in self.retain]) if self.n_retain else torch.zeros(0, 1)
        k = 1 if self.method.k == "all" else self.method.k
        return asked, before, Walk.start(torch.zeros(k, self.lm.d_model if self.basis is None else len(self.basis)))

    def _drawn(self, n: int, size: int, step: int) -> list[int]:
        """Items in turn, in an order that is drawn anew each time around."""
        if not size:
            return []
        per_epoch = max(n // size, 1)
        epoch, batch = divmod(step, per_epoch)
        return order(n, seed=self.method.seed, epoch=epoch)[batch * size : (batch + 1) * size]

    def _record(self, walk: Walk, value: float) -> None:
        if self.journal is None:
            return
        self.journal.log(walk.step, {"loss": value, "queries": self.oracle.queries})
        if walk.step % _EVERY == 0:
            self._checkpoint(walk)

    def _checkpoint(self, walk: Walk) -> None:
        if self.journal is not None:
            self.journal.save(
                {"w": walk.w, "first": walk.first, "second": walk.second, "before": self.before},
                {"step": walk.step, "queries": self.oracle.queries, "asked": list(self.asked)},
            )

    def _resumed(self) -> tuple[Refusing, Tensor, Walk] | None:
        """What was paid for is paid for: it comes back with the checkpoint."""
        found = self.journal.load() if self.journal is not None else None
        if found is None or self.journal is None:
            return None
        self.oracle.queries = found.notes["queries"]
        self.journal.trim(found.notes["step"])
        tensors = found.tensors
        walk = Walk(tensors["w"], tensors["first"], tensors["second"], found.notes["step"])
        refusals, answers = found.notes["asked"]
        asked = Refusing(tuple(refusals), tuple(tuple(tokens) for tokens in answers))
        return asked, tensors["before"], walk
