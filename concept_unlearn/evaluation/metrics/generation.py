"""What a model writes: how much of the answer is in it, and is it varied."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

from ..fluency import is_repetitive
from ..measured import Measured, mean_of
from ..metric import _ItemMetric
from ..view import Read, Reply, Seen, View


class RougeL(NamedTuple):
    """By the longest common subsequence of stemmed words."""

    recall: float
    precision: float
    f1: float


@lru_cache(maxsize=2**14)
def rouge_l(reference: str, text: str) -> RougeL | None:
    """0 of an empty text; None of a reference without a letter of a-z or a digit, which is all that ROUGE reads."""
    scorer = _scorer()
    if not scorer._tokenizer.tokenize(reference):
        return None
    found = scorer.score(reference, text)["rougeL"]
    return RougeL(float(found.recall), float(found.precision), float(found.fmeasure))


class Rouge(_ItemMetric):
    """ROUGE-L of the reply with the answer, the best over several answers; the other of the two is in the notes."""

    needs: ClassVar[tuple[Read, ...]] = ("said",)
    measure: Literal["recall", "f1"] = "recall"
    """recall: of the answer's words, what TOFU reports. f1: lowered by words beyond them, what MUSE reports."""

    def __call__(self, view: View) -> Measured:
        seen, other = view[self.on], {"recall": "f1", "f1": "recall"}[self.measure]
        beside = mean_of([_best(seen, i, other) for i in range(len(seen.examples))])
        values = [self.value(seen, i) for i in range(len(seen.examples))]
        return mean_of(values, notes={"measure": self.measure, other: beside.value})

    def value(self, seen: Seen, i: int) -> float | None:
        return _best(seen, i, self.measure)


class TokenEntropy(_ItemMetric):
    """Entropy of a reply's tokens over the logarithm of their number: 1 where none is repeated (2410.08109).

    0 of at most one token. Near 1 for any short reply: the mean length is in the notes.
    """

    needs: ClassVar[tuple[Read, ...]] = ("said",)

    def __call__(self, view: View) -> Measured:
        lengths = [float(len(tokens_of(reply))) for reply in view[self.on].said]
        found = super().__call__(view)
        return found.model_copy(update={"notes": {"mean_length": mean_of(lengths).value}})

    def value(self, seen: Seen, i: int) -> float:
        return token_entropy(tokens_of(seen.said[i]))


class Repetitive(_ItemMetric):
    """Share of replies that are empty, mostly one token, or mostly 4-grams said before.

    It needs no judge, as ``Gibberish`` does.
    """

    lower_is_better: ClassVar[bool] = True
    needs: ClassVar[tuple[Read, ...]] = ("said",)

    def value(self, seen: Seen, i: int) -> float:
        return float(is_repetitive(tokens_of(seen.said[i])))


def tokens_of(reply: Reply) -> Sequence[Any]:
    """Its token ids; its words where only its text is known."""
    return reply.ids or reply.text.split()


def token_entropy(tokens: Sequence[Any]) -> float:
    n = len(tokens)
    if n < 2:
        return 0.0
    return sum(count / n * math.log2(n / count) for count in Counter(tokens).values()) / math.log2(n)


def _best(seen: Seen, i: int, measure: str) -> float | None:
    found = [rouge_l(answer, seen.said[i].text) for answer in seen.probes[i].answers]
    return max((getattr(f, measure) for f in found if f is not None), default=None)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
