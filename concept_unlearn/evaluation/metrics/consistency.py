"""Does a model say the same when the same is asked in other words?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from ...data.examples import Probe, normalise
from ...errors import InvalidData
from ..measured import Measured, mean_of
from ..metric import Metric
from ..view import Asked, Read, Reply, View
from .generation import rouge_l

_SOFT_F1 = 0.5


def wordings_of(name: str) -> str:
    """What the set with the other wordings of a set's probes is called."""
    return f"{name}_wordings"


def reworded(asked: Asked) -> Asked:
    """The other wordings of a set's probes, each a probe of its own, in order: what ``Consistency`` reads beside it."""
    probes = [e for e in asked.examples if isinstance(e, Probe)]
    return replace(
        asked,
        examples=tuple(
            probe.model_copy(update={"prompt": wording, "wordings": ()})
            for probe in probes
            for wording in probe.wordings
        ),
    )


class Consistency(Metric):
    """How often the replies to two wordings of a question agree: of each probe the mean over pairs, itself among them.

    Reads the set and its ``reworded``, called ``wordings_of(on)``. Undefined for probes with one wording. Empty replies
    agree with each other; the notes say how many probes got nothing else.
    """

    match: Literal["exact", "soft"] = "exact"
    """exact: the same words, whatever the case and accents. soft: those, or ROUGE-L F1 of at least 0.5."""

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return dict.fromkeys((self.on, wordings_of(self.on)), ("said",))

    def __call__(self, view: View) -> Measured:
        seen, others = view[self.on], view[wordings_of(self.on)]
        if others.examples != reworded(seen.asked).examples:
            raise InvalidData(
                f"set {others.name!r} does not ask the other wordings of {seen.name!r}, one by one in order"
            )
        left = iter(others.said)
        facts = [[said, *(next(left) for _ in p.wordings)] for p, said in zip(seen.probes, seen.said, strict=True)]
        silent = sum(len(replies) > 1 and not any(r.text.strip() for r in replies) for replies in facts)
        return mean_of([self._agreement(r) for r in facts], notes={"match": self.match, "all_empty": float(silent)})

    def _agreement(self, replies: Sequence[Reply]) -> float | None:
        pairs = list(combinations([r.text for r in replies], 2))
        return sum(self._agree(a, b) for a, b in pairs) / len(pairs) if pairs else None

    def _agree(self, a: str, b: str) -> bool:
        if normalise(a) == normalise(b):
            return True
        found = rouge_l(a, b) if self.match == "soft" else None
        return found is not None and found.f1 >= _SOFT_F1
