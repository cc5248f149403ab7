"""The survey's protocol: what is to be forgotten, easy and hard, and what is kept, near and far (arXiv 2402.08787)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from ...data.examples import Passage, normalise
from ...data.scope import IN_SCOPE, OUT_OF_SCOPE, PROBES, NamedScope, Scope
from ...errors import EmptyData, InvalidData
from ..benchmark import Benchmark, Kind, Line
from ..metric import Metric
from ..metrics import (
    Consistency,
    ExtractionStrength,
    MembershipAUC,
    PrivLeak,
    Probability,
    reworded,
    wordings_of,
)
from ..view import Asked
from .concept import CHAT_TOKENS, CLOZE_TOKENS

N_GRAM, MOST_SHARED = 8, 0.5
"""At most so much of a document to keep is, in runs of so many words, also in documents to forget; and conversely."""
KEPT = ("near", "retain")
MAX_TOKENS = 512
"""Of a document whose membership is asked."""


class Overlap(NamedTuple):
    """Something to keep that is also to be forgotten."""

    part: str
    """Of the scope."""
    at: int
    why: str


def overlaps(scope: Scope) -> Iterator[Overlap]:
    """Probes to keep with an answer that is to be forgotten, and documents that share more than half with one that is.

    That no prompt is in both is checked when the scope is made.
    """
    answers = {normalise(a): name for name in IN_SCOPE for p in getattr(scope, name) for a in p.answers}
    for part in OUT_OF_SCOPE:
        for i, probe in enumerate(getattr(scope, part)):
            if shared := [a for a in probe.answers if normalise(a) in answers]:
                yield Overlap(
                    part, i, f"{shared[0]!r} answers {probe.prompt!r} and a question of {answers[normalise(shared[0])]}"
                )
    for part in KEPT:
        for i in _shared(getattr(scope, part), scope.forget):
            text = getattr(scope, part)[i].text
            yield Overlap(part, i, f"more than half of {text[:60]!r} is shared with a document to forget")


def _shared(passages: Sequence[Passage], others: Sequence[Passage]) -> Iterator[int]:
    """Which of the passages are more than half in the others, or one of them in it."""
    wholes = [_n_grams(p) for p in others]
    known = frozenset().union(*wholes)
    for i, passage in enumerate(passages):
        grams = _n_grams(passage)
        common = grams & known
        if common and max(len(common) / len(grams), *(len(grams & w) / len(w) for w in wholes)) > MOST_SHARED:
            yield i


class Survey(Benchmark):
    """``Survey(scope)``: each set on its own, never pooled, as log-probabilities and as replies to several wordings.

    With ``holdout`` also whether it can be told that a model was trained on what it is to forget.

    An empty set is measured as undefined. Raises InvalidData where something to keep is also to be forgotten.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    scope: NamedScope
    """A built-in concept, a folder, a .jsonl file or a dataset id."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """drop: what to keep is left out where it is also to be forgotten."""
    holdout: NamedScope | None = None
    """Documents like those to forget that no model here was trained on: what a scope of this name would forget, such as
    a .jsonl of passages. With them it is asked whether it can be told which of the two a model was trained on. Where
    the two differ in more than that, so does what tells them apart: compare with the retrained model."""
    n_items: int | None = Field(None, gt=0)
    """Of each set, the first so many."""

    def __init__(self, scope: Scope | str | None = None, **settings: Any) -> None:
        super().__init__(**{"scope": scope, **settings})
        if not any(getattr(self.scope, name) for name in IN_SCOPE):
            raise EmptyData(
                f"scope {self.scope.name!r} has no in_easy or in_hard probe: forgetting could not be told from nothing"
            )
        if self.overlap == "refuse" and (found := list(overlaps(self.scope))):
            raise InvalidData(
                f"scope {self.scope.name!r}, {found[0].part}: {found[0].why} ({len(found)} such in all); "
                "overlap='drop' leaves them out"
            )
        if self.holdout is not None and (shared := list(_shared(self.holdout.forget, self.scope.forget))):
            text = self.holdout.forget[shared[0]].text
            raise InvalidData(
                f"holdout: more than half of {text[:60]!r} is shared with a document to forget ({len(shared)} such in "
                "all): what was trained on is not held out"
            )

    @property
    def name(self) -> str:
        return self.scope.name

    @cached_property
    def request(self) -> Scope:
        """The scope, without what is to be kept and forgotten at once."""
        gone = {(o.part, o.at) for o in overlaps(self.scope)} if self.overlap == "drop" else set()
        kept: dict[str, Any] = {
            part: tuple(e for i, e in enumerate(getattr(self.scope, part)) if (part, i) not in gone) for part, _ in gone
        }
        return replace(self.scope, **kept)

    @cached_property
    def sets(self) -> Mapping[str, Asked]:
        found: dict[str, Asked] = {}
        for name in PROBES:
            asked = Asked(getattr(self.request, name)[: self.n_items], CHAT_TOKENS, max_cloze_tokens=CLOZE_TOKENS)
            found |= {name: asked, wordings_of(name): reworded(asked)}
        if self.holdout is not None:
            for name, documents in (("forget", self.request.forget), ("holdout", self.holdout.forget)):
                found[name] = Asked(documents[: self.n_items], max_tokens=MAX_TOKENS)
        return found

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        found: list[Metric] = [
            metric
            for name in PROBES
            for metric in (ExtractionStrength(on=name), Probability(on=name), Consistency(on=name))
        ]
        if self.holdout is not None:
            found += [MembershipAUC(), PrivLeak()]
            found += [MembershipAUC(attack=a, label=f"{a}_auc") for a in ("loss", "zlib", "min_k_plus_plus")]
        return tuple(found)

    @property
    def leaks(self) -> tuple[Metric, ...]:
        return tuple(ExtractionStrength(on=name) for name in IN_SCOPE if getattr(self.request, name))

    @property
    def keeps(self) -> Metric:
        """Of the nearest that is to be kept."""
        name = next(n for n in (*OUT_OF_SCOPE, *IN_SCOPE) if getattr(self.request, n))
        return ExtractionStrength(on=name)

    @property
    def lines(self) -> tuple[Line, ...]:
        wanted = dict.fromkeys(IN_SCOPE, ("Forgotten", "low")) | dict.fromkeys(OUT_OF_SCOPE, ("Kept", "as before"))
        found = []
        for name, (section, goal) in wanted.items():
            for metric, what in _WORDS.items():
                column = name if metric == "extraction_strength" else None
                found.append(Line.of(section, f"{what}, {_SETS[name]}", f"{name}/{metric}", goal, column))
        for metric, (what, kind) in _MEMBERSHIP.items() if self.holdout is not None else ():
            found.append(Line.of("Trained on", what, f"forget/{metric}", "as retrained", kind=kind))
        return tuple(found)


_SETS = {
    "in_easy": "questions about the concept",
    "in_hard": "the same asked otherwise",
    "out_near": "neighbouring knowledge",
    "out_far": "general knowledge",
}
_MEMBERSHIP: dict[str, tuple[str, Kind]] = {
    "membership_auc": ("told from documents never seen, by Min-K (0.5: not at all)", "number"),
    "loss_auc": ("the same by the loss", "number"),
    "zlib_auc": ("the same by the loss a byte as zlib packs it", "number"),
    "min_k_plus_plus_auc": ("the same by Min-K++", "number"),
    "priv_leak": ("how far from the retrained model's (PrivLeak)", "number"),
}
_WORDS = {
    "extraction_strength": "how much of the answer it says by itself",
    "probability": "how likely it finds the answer",
    "consistency": "says the same whatever the wording",
}


def _n_grams(passage: Passage) -> frozenset[tuple[str, ...]]:
    """Of a text and the message that it replies to; all of one that is shorter."""
    words = normalise(f"{passage.prompt or ''} {passage.text}").split()
    return frozenset(tuple(words[i : i + N_GRAM]) for i in range(max(len(words) - N_GRAM + 1, 1)))
