"""Unlearn a model that only answers: embeddings of a guarded prompt, learned from probabilities alone.

Black-box Adversarial Reprogramming (arXiv 2007.08714) turned to unlearning. No backward pass, no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from ..activations import stream
from ..data.encode import encode_answer
from ..gates import Gate, ProbeGate
from ..lm import LM
from ..lm.oracle import EMBEDDING, Oracle
from ..patches import PromptPatch
from ..patches.base import Switch
from ..patches.prompt_edits import Vectors
from ..training.rows import REFUSALS, order
from ..zeroth import Walk, Zeroth, check_budget, descend, n_queries
from .base import Method, Study
from .families import check_families, focal, frequency_mapping, map_labels
from .questions import Question, fitted_gate, flagged, forget_questions, journal_of, retain_questions

_REFUSE, _ANSWER = 0, 1
_MAX_RETAIN = 64
"""Prompts to keep that the gate lets through, evenly spread over those there are."""
_EVERY = 10
"""Steps from one checkpoint to the next."""


class BlackBox(Method, Zeroth):
    """Learn vectors, added to the embeddings of flagged prompts, that turn answers into refusals.

    Goes down L = mean focal(h, refuse) over forget prompts + retain_weight mean KL(p^0 || p) over retain prompts, of
    either only those that the gate lets through: no other prompt will ever meet the vectors. h is what refusals and
    answers begin with, normalised, so one rises as the other falls. Probing steps and vectors are in units of the
    embeddings' root mean square. With a study's folder it goes on from its last checkpoint.
    """

    k: PositiveInt | Literal["all"] = 4
    """Vectors, each for one of the first tokens of the prompt's text; ``all``: a single one, for every token of it."""
    gate: Gate = ProbeGate(alpha=0.01)
    mapping: Literal["first_tokens", "frequency"] = "first_tokens"
    """Answers begin with the first tokens of those that are known, or with the ``m`` tokens that the model itself
    begins with most; refusals with those of the built-in ones."""
    m: int = Field(6, gt=0)
    g: float = Field(2.0, ge=0)
    """Of the focal loss; 0 is cross-entropy."""
    retain_weight: float = Field(1.0, ge=0)

    def fit(self, study: Study) -> PromptPatch:
        asking = _Asking(self, study)
        walk = asking.run()
        return PromptPatch(
            edit=asking.edit(walk.w), gate=asking.gate, sensor=asking.sensor, queries=asking.oracle.queries
        )


class _Asking:
    """One fit: which prompts are asked about, what has been paid for, how good a point is."""

    def __init__(self, method: BlackBox, study: Study) -> None:
        self.method, self.lm, lm = method, study.lm, study.lm
        questions = forget_questions(lm, study.scope)
        self.gate, self.sensor = fitted_gate(study, method.gate)
        guard = PromptPatch(edit=Vectors(torch.zeros(1, lm.d_model)), gate=self.gate, sensor=self.sensor)
        self.forget = flagged(guard, lm, questions)
        kept = flagged(guard, lm, retain_questions(lm, study.scope), needed=False)
        self.retain = kept[:: max(math.ceil(len(kept) / _MAX_RETAIN), 1)]
        self.n_forget = min(method.batch_size, len(self.forget))
        self.n_retain = min(method.batch_size, len(self.retain)) if method.retain_weight else 0
        self.oracle = Oracle(lm, progress=study.progress)
        self.journal = journal_of(method, study, [*self.forget, *self.retain])
        check_budget(method, cost=self._cost, spent=self._preparation)
        self.scale = _rms(lm, self.forget)
        self.families, self.before, self.walk = self._resumed() or self._begun()

    def run(self) -> Walk:
        walk = descend(
            self.loss, self.walk, self.method, cost=self._cost, spent=lambda: self.oracle.queries, each=self._record
        )
        self._checkpoint(walk)
        return walk

    def edit(self, w: Float[Tensor, "k d"]) -> Vectors:
        return Vectors(self.scale * w, "all" if self.method.k == "all" else "first")

    def loss(self, points: Float[Tensor, "points k d"], step: int) -> Float[Tensor, " points"]:
        forget = [self.forget[i] for i in self._drawn(len(self.forget), self.n_forget, step)]
        kept = self._drawn(len(self.retain), self.n_retain, step)
        prompts = [q.ids for q in (*forget, *(self.retain[i] for i in kept))]
        label = torch.full((len(forget),), _REFUSE)
        values = []
        for w in points:
            edits = PromptPatch(edit=self.edit(w)).edits(self.lm, Switch())
            p = self.oracle.probabilities(prompts, edits)
            h = map_labels(p[: len(forget)], self.families, normalise=True)
            value = focal(h, label, g=self.method.g).mean()
            if kept:
                value = value + self.method.retain_weight * _kl(self.before[kept], p[len(forget) :]).mean()
            values.append(value)
        return torch.stack(values)

    @property
    def _cost(self) -> int:
        return n_queries(self.n_forget + self.n_retain, self.method.q, self.method.sides)

    @property
    def _preparation(self) -> int:
        return (len(self.retain) if self.n_retain else 0) + (
            len(self.forget) if self.method.mapping == "frequency" else 0
        )

    def _begun(self) -> tuple[list[tuple[int, ...]], Tensor, Walk]:
        families = self._families()
        before = self.oracle.probabilities([q.ids for q in self.retain]) if self.n_retain else torch.zeros(0, 1)
        k = 1 if self.method.k == "all" else self.method.k
        return families, before, Walk.start(torch.zeros(k, self.lm.d_model))

    def _families(self) -> list[tuple[int, ...]]:
        """Raises EmptyData or InvalidConfig for families that are empty or share a token."""
        chats = sorted({q.chat for q in self.forget})
        refusals = [_first(self.lm, text, chat) for text in _refusals() for chat in chats]
        answers = [answer[0] for q in self.forget for answer in q.answers]
        if self.method.mapping == "first_tokens":
            found = {"refusal": tuple(dict.fromkeys(refusals)), "answer": tuple(dict.fromkeys(answers))}
            check_families(found)
            return list(found.values())
        said = self.oracle.probabilities([q.ids for q in self.forget])
        begun = torch.nn.functional.one_hot(torch.tensor(refusals), said.shape[1]).float().mean(0)
        return frequency_mapping([begun[None], said], self.method.m)

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
                {"step": walk.step, "queries": self.oracle.queries, "families": self.families},
            )

    def _resumed(self) -> tuple[list[tuple[int, ...]], Tensor, Walk] | None:
        """What was paid for is paid for: it comes back with the checkpoint."""
        found = self.journal.load() if self.journal is not None else None
        if found is None or self.journal is None:
            return None
        self.oracle.queries = found.notes["queries"]
        self.journal.trim(found.notes["step"])
        tensors = found.tensors
        walk = Walk(tensors["w"], tensors["first"], tensors["second"], found.notes["step"])
        return [tuple(tokens) for tokens in found.notes["families"]], tensors["before"], walk


def _rms(lm: LM, questions: Sequence[Question]) -> float:
    """Root mean square of an entry of the embeddings of these prompts' texts."""
    rows = stream(lm, [EMBEDDING], [q.ids for q in questions], skip=lm.chat_head)
    squares = [(float(x.double().square().sum()), x.numel()) for r in rows for x in (r.activations[EMBEDDING],)]
    return float((sum(s for s, _ in squares) / sum(n for _, n in squares)) ** 0.5)


def _kl(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(1)


def _refusals() -> list[str]:
    return REFUSALS.read_text(encoding="utf-8").splitlines()


def _first(lm: LM, text: str, chat: bool) -> int:
    return encode_answer(lm.tokenizer, text, after_space=not chat)[0]
