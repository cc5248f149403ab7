"""How well running text is predicted."""

from __future__ import annotations

from typing import ClassVar

from ..measured import Measured, mean_of
from ..metric import _ItemMetric
from ..view import Read, Seen, View


class Perplexity(_ItemMetric):
    """exp(total NLL / total tokens), not a mean over texts; tokens without left context do not count.

    Long texts are read in overlapping windows, each token scored once. Its logarithm is in the notes.
    """

    lower_is_better: ClassVar[bool] = True
    needs: ClassVar[tuple[Read, ...]] = ("answers",)

    def value(self, seen: Seen, i: int) -> float | None:
        found = seen.answers[i][0].mean_logprob
        return None if found is None else -found

    def __call__(self, view: View) -> Measured:
        seen = view[self.on]
        weights = [float(group[0].n) for group in seen.answers]
        values = [self.value(seen, i) for i in range(len(seen.examples))]
        total = sum(v * w for v, w in zip(values, weights, strict=True) if v is not None)
        log = total / sum(weights) if sum(weights) else None
        return mean_of(values, weights=weights, scale="exp", notes={"log_perplexity": log})
