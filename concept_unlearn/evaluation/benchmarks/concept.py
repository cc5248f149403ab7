"""The concept benchmark: what of a scope is forgotten, what is kept, and does the model still write well."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ...data.examples import Probe
from ...data.scope import IN_SCOPE, OUT_OF_SCOPE, PROBES, NamedScope, Scope
from ...errors import EmptyData
from ..benchmark import Benchmark, Line
from ..metric import Metric
from ..metrics import AnswerLogprob, GeneratedAccuracy, Gibberish, Perplexity, RankedAccuracy, Touched
from ..view import Asked

TEXTS = {"forget": "forget", "near": "near", "general": "retain"}
"""Perplexity is measured on these passages of the scope."""
CLOZE_TOKENS, CHAT_TOKENS = 10, 32
"""How far into a reply an accepted answer may stand."""
_BORROWED_DISTRACTORS = 7


class ConceptBenchmark(Benchmark):
    """``ConceptBenchmark(scope)``: probes in scope and out of it, and perplexity of its passages."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    scope: NamedScope
    """A built-in concept, a folder, a .jsonl file or a dataset id."""
    half: Literal["test", "tune", "all"] = "all"
    """Of the scope: test is the half to report on, tune the one that settings are chosen on."""
    max_probes: int | None = Field(None, gt=0)
    """Of each set, the first so many; a smaller number is quicker and says less."""
    max_passages: int = Field(24, ge=0)
    """Of each kind, for perplexity."""
    max_tokens: int = Field(96, gt=1)
    """Of each passage."""

    def __init__(self, scope: Scope | str | None = None, **settings: Any) -> None:
        loaded = Scope.load(scope) if isinstance(scope, str) else scope
        super().__init__(scope=loaded, **settings)  # type: ignore[call-arg]
        if not any(name in self.sets for name in IN_SCOPE):
            raise EmptyData(
                f"scope {self.scope.name!r} has no in_easy or in_hard probe: forgetting could not be told from nothing"
            )

    @property
    def name(self) -> str:
        return self.scope.name

    @cached_property
    def sets(self) -> Mapping[str, Asked]:
        scope = self.scope if self.half == "all" else getattr(self.scope.halves(), self.half)
        found = {}
        for name in PROBES:
            probes = getattr(scope, name)[: self.max_probes]
            found[name] = Asked(
                tuple(_with_distractors(p, probes) for p in probes), CHAT_TOKENS, max_cloze_tokens=CLOZE_TOKENS
            )
        for name, part in TEXTS.items():
            found[name] = Asked(getattr(scope, part)[: self.max_passages], max_tokens=self.max_tokens)
        return {name: asked for name, asked in found.items() if asked.examples}

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        found: list[Metric] = []
        for name in PROBES:
            if name in self.sets:
                found += [GeneratedAccuracy(on=name), RankedAccuracy(on=name), AnswerLogprob(on=name), Touched(on=name)]
        for name in TEXTS:
            if name in self.sets:
                found += [Perplexity(on=name), Touched(on=name)]
        for name, parts in (("in_scope", IN_SCOPE), ("out_of_scope", OUT_OF_SCOPE)):
            if asked := tuple(part for part in parts if part in self.sets):
                found.append(Gibberish(on=name, sets=asked))
        return tuple(found)

    @cached_property
    def request(self) -> Scope:
        """What is reported on one half is made from the other."""
        return self.scope if self.half == "all" else self.scope.halves().tune

    @property
    def leaks(self) -> tuple[Metric, ...]:
        return tuple(GeneratedAccuracy(on=name) for name in IN_SCOPE if name in self.sets)

    @property
    def keeps(self) -> Metric:
        return GeneratedAccuracy(on=next(n for n in (*OUT_OF_SCOPE, *IN_SCOPE) if n in self.sets))

    @property
    def lines(self) -> tuple[Line, ...]:
        return _LINES


def _with_distractors(probe: Probe, probes: tuple[Probe, ...]) -> Probe:
    """Its own, or else the first answers of other probes of the set, as wrong as they are for this one."""
    if probe.distractors:
        return probe
    others = dict.fromkeys(p.answers[0] for p in probes if not probe.answered_by(p.answers[0]))
    return probe.model_copy(update={"distractors": tuple(others)[:_BORROWED_DISTRACTORS]})


_LINES = (
    Line.of("Forgotten", "answers right, questions about the concept", "in_easy/generated_accuracy", "low", "easy"),
    Line.of("Forgotten", "… reworded, indirect, other formats", "in_hard/generated_accuracy", "low", "hard"),
    Line.of("Forgotten", "picks the right answer from a list", "in_easy/ranked_accuracy", "low"),
    Line.of("Forgotten", "perplexity on text about the concept", "forget/perplexity", "high", kind="factor"),
    Line.of("Kept", "answers right, neighbouring knowledge", "out_near/generated_accuracy", "as before", "near"),
    Line.of("Kept", "answers right, general knowledge", "out_far/generated_accuracy", "as before", "far"),
    Line.of("Kept", "perplexity on general text", "general/perplexity", "as before", "perplexity", kind="factor"),
    Line.of("Side effects", "gibberish answers about the concept", "in_scope/gibberish", "as before", "gibberish"),
    Line.of("Side effects", "gibberish answers elsewhere", "out_of_scope/gibberish", "as before"),
    Line.of("Side effects", "questions about the concept the patch touches", "in_easy/touched", "high"),
    Line.of("Side effects", "… reworded, indirect, other formats", "in_hard/touched", "high"),
    Line.of("Side effects", "neighbouring questions the patch touches", "out_near/touched", "low"),
    Line.of("Side effects", "general questions the patch touches", "out_far/touched", "low"),
)  # fmt: skip
