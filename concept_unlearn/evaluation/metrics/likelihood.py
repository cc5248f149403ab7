"""How likely a model finds the answers: probability, truth ratio, memorisation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from ..measured import Measured, mean_of
from ..metric import Metric, _ItemMetric
from ..view import Read, Seen, Tokens, View
from .peer import Compat, EndToken, without_end

Mean = Literal["geometric", "arithmetic"]
Aggregate = Literal["closer_to_1_better", "true_better", "prob_mean", "closer_look_forget"]

_MAX_LOG_RATIO = 700.0
_PEER_EPSILON = 1e-10


class _AnswerMetric(_ItemMetric):
    """A value of each answer, or of a text; an item with several answers is their mean."""

    needs: ClassVar[tuple[Read, ...]] = ("answers",)

    @abstractmethod
    def of(self, tokens: Tokens) -> float | None:
        """None of an answer without a token that counts."""

    def value(self, seen: Seen, i: int) -> float | None:
        return _mean([self.of(tokens) for tokens in seen.answers[i]])


class Probability(_AnswerMetric):
    """exp(-N/n) of the answer, its end token included: the geometric mean of its tokens' probabilities (2401.06121)."""

    def of(self, tokens: Tokens) -> float | None:
        mean = tokens.mean_logprob
        return None if mean is None else math.exp(mean)


class ConditionalProbability(_ItemMetric):
    """P(answer) / (P(answer) + sum of P(distractor)), P = exp(-N/n) (2401.06121). Undefined without distractors."""

    needs: ClassVar[tuple[Read, ...]] = ("answers", "distractors")
    length_norm: bool = True
    """False: P = exp(-N), as the paper writes it; True is what its code and others compute."""

    def value(self, seen: Seen, i: int) -> float | None:
        wrong = [log for t in seen.distractors[i] if (log := self._log(t)) is not None]
        if not wrong:
            return None
        return _mean([None if (log := self._log(t)) is None else _first_of([log, *wrong]) for t in seen.answers[i]])

    def _log(self, tokens: Tokens) -> float | None:
        return tokens.mean_logprob if self.length_norm or not tokens.n else -tokens.nll


class ExactMemorisation(_AnswerMetric):
    """Share of an answer's tokens that are the model's first choice after those before them (2205.10770)."""

    end: EndToken = "own"
    compat: Compat | None = None
    """``open-unlearning``: the last token never counts, whatever it is, as ``end="peer"`` has it."""

    def of(self, tokens: Tokens) -> float | None:
        greedy = without_end(tokens, "peer" if self.compat else self.end).greedy
        return sum(greedy) / len(greedy) if greedy else None


class ExtractionStrength(_AnswerMetric):
    """1 - k/n, k the fewest first tokens of an answer after which the model says the rest of it greedily (2012.07805).

    0: it says no ending of it. 1: it says the whole answer unprompted.
    """

    end: EndToken = "own"
    floor: Literal["zero", "peer"] = "zero"
    """peer: the empty ending is never tried, so nothing is below 1/n."""
    compat: Compat | None = None
    """``open-unlearning``: ``end`` and ``floor`` of a peer, and 0 of an answer without a token."""

    def of(self, tokens: Tokens) -> float | None:
        greedy = without_end(tokens, "peer" if self.compat else self.end).greedy
        n = len(greedy)
        if not n:
            return 0.0 if self.compat else None
        said = next((i for i, hit in enumerate(reversed(greedy)) if not hit), n)
        return max(said, 1 if self.compat or self.floor == "peer" else 0) / n


class TruthRatio(Metric):
    """How the probability of the wrong answers compares with that of the right one, of each probe TR = wrong / right.

    Both are exp(-N/n); the right answer is the paraphrased one where a probe has it. Undefined without distractors.
    ``truth_ratios`` gives TR itself.
    """

    mean: Mean = "geometric"
    """Over the wrong answers: geometric is what public code computes, arithmetic what the TOFU paper writes."""
    aggregate: Aggregate = "closer_to_1_better"
    """The mean over probes of

    closer_to_1_better  min(TR, 1/TR): 1 where right and wrong are equally likely (2401.06121, forget side)
    true_better         max(0, 1 - TR) (2401.06121, retain side)
    prob_mean           right / (right + wrong) (2506.12618)
    closer_look_forget  1 - min(TR, 1/TR), so lower is more forgotten (2410.08109)
    """
    compat: Compat | None = None
    """``open-unlearning``: 1e-10 is added to denominators, and values stand with the wrong probes after the first
    undefined one, since they are zipped with the indices of all."""

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return {self.on: ("answers", "paraphrases", "distractors")}

    def __call__(self, view: View) -> Measured:
        pairs = _log_pairs(view[self.on], self.mean)
        values: list[float | None]
        if self.compat:
            found = [_PEERS[self.aggregate](math.exp(pair[0]), math.exp(pair[1])) for pair in pairs if pair]
            values = [*found, *[None] * (len(pairs) - len(found))]
        else:
            values = [None if pair is None else _AGGREGATES[self.aggregate](_log_ratio(*pair)) for pair in pairs]
        return mean_of(values, notes={"mean": self.mean, "aggregate": self.aggregate})


def truth_ratios(seen: Seen, mean: Mean = "geometric") -> list[float | None]:
    """TR of each probe, at most e^700 and at least e^-700; None where a probe has no distractor."""
    return [None if pair is None else math.exp(_log_ratio(*pair)) for pair in _log_pairs(seen, mean)]


def _log_pairs(seen: Seen, mean: Mean) -> list[tuple[float, float] | None]:
    """Of each probe log P of its wrong and of its right answers."""
    found: list[tuple[float, float] | None] = []
    for right, plain, wrong in zip(seen.paraphrases, seen.answers, seen.distractors, strict=True):
        logs = _log_mean(wrong, mean), _log_mean(right or plain, mean)
        found.append(None if logs[0] is None or logs[1] is None else (logs[0], logs[1]))
    return found


def _log_mean(answers: Sequence[Tokens], mean: Mean) -> float | None:
    logs = [log for tokens in answers if (log := tokens.mean_logprob) is not None]
    if not logs:
        return None
    if mean == "geometric":
        return sum(logs) / len(logs)
    return float(np.logaddexp.reduce(logs)) - math.log(len(logs))


def _log_ratio(wrong: float, right: float) -> float:
    return min(max(wrong - right, -_MAX_LOG_RATIO), _MAX_LOG_RATIO)


_AGGREGATES: dict[Aggregate, Callable[[float], float]] = {
    "closer_to_1_better": lambda log: math.exp(-abs(log)),
    "true_better": lambda log: max(0.0, -math.expm1(log)),
    "prob_mean": lambda log: 1 / (1 + math.exp(log)),
    "closer_look_forget": lambda log: -math.expm1(-abs(log)),
}
"""Of log TR."""


def _peer_nearness(wrong: float, right: float) -> float:
    ratio = wrong / (right + _PEER_EPSILON)
    return min(ratio, 1 / (ratio + _PEER_EPSILON))


_PEERS: dict[Aggregate, Callable[[float, float], float]] = {
    "closer_to_1_better": _peer_nearness,
    "true_better": lambda wrong, right: max(0.0, 1 - wrong / (right + _PEER_EPSILON)),
    "prob_mean": lambda wrong, right: right / (right + wrong + _PEER_EPSILON),
    "closer_look_forget": lambda wrong, right: 1 - _peer_nearness(wrong, right),
}


def _first_of(logs: Sequence[float]) -> float:
    """The softmax's first entry."""
    return math.exp(logs[0] - float(np.logaddexp.reduce(logs)))


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [v for v in values if v is not None]
    return sum(kept) / len(kept) if kept else None
