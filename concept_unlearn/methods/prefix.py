"""Unlearn a model that takes and gives nothing but text: a prefix for flagged prompts, chosen among some by asking."""

from __future__ import annotations

import math
import warnings

import torch
from pydantic import Field

from ..data.encode import common_prefix
from ..errors import InvalidConfig
from ..gates import Gate, ProbeGate
from ..lm.oracle import Oracle
from ..patches import PrefixPatch
from ..training.rows import order
from .base import Method, Study
from .black_box import MAX_RETAIN
from .questions import Question, fitted_gate, flagged, forget_questions, retain_questions
from .refusing import Labels, Refusing, divergence, n_preparing, refusing

PREFIXES = (
    "I'm sorry, but I can't help with that. ",
    "Do not answer. Apologise and decline. ",
    "I cannot answer questions about this. ",
    "Refuse to answer what follows: ",
    "You do not know the answer to this. ",
    'Say "I don\'t know" to the following question. ',
    'Begin your reply with "I\'m sorry".\n\n',
    "Ignore the question and reply that you cannot help.\n\n",
    "The following is about something you have never heard of. Say so.\n\n",
    "You have forgotten everything about what is asked here.\n\n",
    "Question: What is the secret? Answer: I'm sorry, I don't know.\nQuestion: ",
    "Q: Who was it? A: I'm sorry, I have no information about that.\nQ: When was it? A: I'm sorry, I don't know.\nQ: ",
    "Tell me a story about a dog. ",
    "Reply in French: ",
)
"""Some that ask for a refusal, show one or begin with one, and two that only lead away."""


class Prefix(Method, Labels):
    """Choose the prefix with the least L, see ``Labels``: no embedding is written and no gradient is taken.

    By successive halving: all are tried on a few prompts, the better half on as many more, and so on until one is
    left, or the prompts or the budget are used up. Of two that are equal the first is taken.
    """

    prefixes: tuple[str, ...] = Field(PREFIXES, min_length=1)
    """Texts, with the space or line break that is to part them from the prompt."""
    gate: Gate = ProbeGate(alpha=0.01, window=8)
    batch_size: int = Field(4, gt=0)
    """Prompts of each kind that each prefix is tried on first."""
    budget: int = Field(2000, gt=0)
    """The most queries that may be spent, whatever they are spent on."""
    seed: int = 0

    def fit(self, study: Study) -> PrefixPatch:
        trial = _Trial(self, study)
        chosen = trial.run()
        text = self.prefixes[chosen]
        return PrefixPatch(
            text=text, ids=trial.ids[chosen], gate=trial.gate, sensor=trial.sensor, queries=trial.oracle.queries
        )


class _Trial:
    """One choice, and what it has cost so far."""

    def __init__(self, method: Prefix, study: Study) -> None:
        self.method, self.lm, lm = method, study.lm, study.lm
        self.ids = [tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in method.prefixes]
        questions = forget_questions(lm, study.scope)
        self.gate, self.sensor = fitted_gate(study, method.gate)
        guard = PrefixPatch(text="", ids=(), gate=self.gate, sensor=self.sensor)
        self.forget = _shuffled(flagged(guard, lm, questions), method.seed)
        kept = flagged(guard, lm, retain_questions(lm, study.scope), needed=False) if method.retain_weight else []
        self.retain = _shuffled(kept, method.seed)[:MAX_RETAIN]
        self.oracle = Oracle(lm, progress=study.progress)
        self.totals = torch.zeros(len(self.ids) + 1, 2, dtype=torch.float64)
        """Losses so far of each prefix and of none: over prompts to forget, and to keep."""

    def run(self) -> int:
        """Which prefix. Raises InvalidConfig where the budget does not pay for a first round."""
        asked, left, done, n = self._asked(), list(range(len(self.ids))), 0, self.method.batch_size
        while True:
            forget, retain = range(done, min(n, len(self.forget))), range(done, min(n, len(self.retain)))
            if self._cost(len(left), forget, retain) > self.method.budget - self.oracle.queries:
                break
            self._try(asked, left, forget, retain)
            done, n = n, 2 * n
            left = sorted(left, key=lambda i: (self._mean(i, done), i))[: max(math.ceil(len(left) / 2), 1)]
            if len(left) == 1 or done >= max(len(self.forget), len(self.retain)):
                break
        if self._mean(left[0], done) >= self._mean(-1, done):
            warnings.warn(
                f"no prefix of {len(self.ids)} brings the prompts to forget nearer to a refusal than none does: give "
                "others as prefixes",
                stacklevel=2,
            )
        return left[0]

    def _asked(self) -> Refusing:
        n, method = n_preparing(self.method, len(self.forget)), self.method
        first = range(min(method.batch_size, len(self.forget))), range(min(method.batch_size, len(self.retain)))
        if (cost := n + self._cost(len(self.ids), *first)) > method.budget:
            raise InvalidConfig(
                f"a budget of {method.budget} queries does not pay for trying each of {len(self.ids)} prefixes once, "
                f"which takes {cost}: raise budget, or lower batch_size or the number of prefixes"
            )
        return refusing(self.lm, self.oracle, method, self.forget)

    def _cost(self, n_left: int, forget: range, retain: range) -> int:
        """Of a round: each prefix that is left, and none."""
        return (n_left + 1) * (len(forget) + len(retain))

    def _try(self, asked: Refusing, left: list[int], forget: range, retain: range) -> None:
        plain = [self.forget[i] for i in forget] + [self.retain[i] for i in retain]
        before = self.oracle.probabilities([q.ids for q in plain])
        for i in (*left, -1):
            p = before if i == -1 else self.oracle.probabilities([self._behind(i, q) for q in plain])
            if forget:
                self.totals[i, 0] += asked.loss(p[: len(forget)], forget, self.method).sum()
            self.totals[i, 1] += divergence(before[len(forget) :], p[len(forget) :]).sum()

    def _mean(self, i: int, done: int) -> float:
        forget, retain = min(done, len(self.forget)), min(done, len(self.retain))
        kept = self.totals[i, 1] / retain if retain else 0.0
        return float(self.totals[i, 0] / max(forget, 1) + self.method.retain_weight * kept)

    def _behind(self, i: int, question: Question) -> list[int]:
        at = len(common_prefix(question.ids, self.lm.chat_head))
        while question.ids[at] == self.lm.bos_id:
            at += 1
        return [*question.ids[:at], *self.ids[i], *question.ids[at:]]


def _shuffled(questions: list[Question], seed: int) -> list[Question]:
    return [questions[i] for i in order(len(questions), seed=seed, epoch=0)]
