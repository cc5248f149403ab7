"""The concept benchmark: what of a scope is forgotten, what is kept, and does the model still write well."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..component import Frozen
from ..data.encode import encode_text
from ..data.examples import Passage
from ..data.scope import IN_SCOPE, OUT_OF_SCOPE, PROBES, Scope
from ..errors import EmptyData
from ..lm import LM
from ..patches import Patch
from ..tracking import Progress
from .bootstrap import Estimate, estimate
from .fluency import is_gibberish, surprises
from .probes import ProbeRow, probe_rows

TEXTS = {"forget": "forget", "near": "near", "general": "retain"}
"""Perplexity is measured on these passages of the scope."""


class TextRow(Frozen):
    """A passage's log-likelihood."""

    text: str
    logprob: float
    """Nats, over ``n_tokens`` tokens."""
    n_tokens: int


class Rows(Frozen):
    """Everything that was observed of one model: probes by set, passages by kind."""

    probes: dict[str, tuple[ProbeRow, ...]]
    texts: dict[str, tuple[TextRow, ...]]
    surprise: dict[str, tuple[float | None, ...]]
    """Nats a token of each generation under the model without its patch."""
    seconds: float


@dataclass(frozen=True)
class ConceptBenchmark:
    """``observe`` a model, patched or not; ``summarise`` what was observed against the unpatched model."""

    scope: Scope
    max_probes: int | None = None
    """Of each set, the first so many; a smaller number is quicker and says less."""
    max_passages: int = 24
    """Of each kind, for perplexity."""
    max_tokens: int = 96
    """Of each passage."""
    batch_size: int = 32
    sets: tuple[str, ...] = field(default=PROBES)

    def __post_init__(self) -> None:
        if not any(self.probes(name) for name in IN_SCOPE):
            raise EmptyData(
                f"scope {self.scope.name!r} has no in_easy or in_hard probe: forgetting could not be told from nothing"
            )

    def probes(self, name: str) -> Sequence[Any]:
        found = getattr(self.scope, name) if name in self.sets else ()
        return found[: self.max_probes]

    def passages(self, name: str) -> Sequence[Passage]:
        found: Sequence[Passage] = getattr(self.scope, TEXTS[name])
        return found[: self.max_passages]

    @property
    def n_steps(self) -> int:
        """How often ``progress`` will have been told of one more."""
        return 3 * sum(len(self.probes(name)) for name in self.sets) + sum(len(self.passages(n)) for n in TEXTS)

    def observe(self, lm: LM, patch: Patch | None = None, *, progress: Progress | None = None) -> Rows:
        """Every probe asked and every passage read once, with the patch on."""
        start = time.perf_counter()
        with patch.on(lm) if patch is not None else contextlib.nullcontext():
            flat = [p for name in self.sets for p in self.probes(name)]
            rows = iter(probe_rows(lm, flat, batch_size=self.batch_size, progress=progress))
            probes = {name: tuple(next(rows) for _ in self.probes(name)) for name in self.sets}
            texts = {name: read_texts(lm, self.passages(name), self.max_tokens, progress=progress) for name in TEXTS}
        surprise = {name: _surprise(lm, found, self.batch_size, progress) for name, found in probes.items()}
        return Rows(probes=probes, texts=texts, surprise=surprise, seconds=time.perf_counter() - start)

    def summarise(self, base: Rows, patched: Rows) -> dict[str, dict[str, Estimate]]:
        """Per metric the base's value, the patched model's, and their paired ratio or difference."""
        found: dict[str, dict[str, Estimate]] = {}
        for name in self.sets:
            b, p = base.probes[name], patched.probes[name]
            if not b:
                continue
            for measure in ("generated", "ranked"):
                right_b, right_p = _right(b, measure), _right(p, measure)
                found[f"{name}/{measure}_accuracy"] = {
                    "base": estimate([right_b]),
                    "patched": estimate([right_p]),
                    "relative": estimate([right_p, right_b], _ratio),
                }
            logprob_b, logprob_p = ([r.answer_logprob for r in rows] for rows in (b, p))
            found[f"{name}/answer_logprob"] = {
                "base": estimate([logprob_b]),
                "patched": estimate([logprob_p]),
                "change": estimate([logprob_p, logprob_b], _difference),
            }
        for name in TEXTS:
            if base.texts[name]:
                found[f"{name}/perplexity"] = _perplexity(base.texts[name], patched.texts[name])
        for name, sets in (("in_scope", IN_SCOPE), ("out_of_scope", OUT_OF_SCOPE)):
            gibberish_b, gibberish_p = (_gibberish(rows, sets) for rows in (base, patched))
            if gibberish_b:
                found[f"{name}/gibberish"] = {
                    "base": estimate([gibberish_b]),
                    "patched": estimate([gibberish_p]),
                    "change": estimate([gibberish_p, gibberish_b], _difference),
                }
        for name in (*self.sets, *TEXTS):
            touched = _touched(base, patched, name)
            if touched:
                found[f"{name}/touched"] = {"patched": estimate([touched])}
        return found


def read_texts(
    lm: LM, passages: Sequence[Passage], max_tokens: int, *, progress: Progress | None = None
) -> tuple[TextRow, ...]:
    """The first ``max_tokens`` tokens of each passage, those without anything to their left not counted."""
    ids = [encode_text(lm.tokenizer, p.text, p.prompt)[:max_tokens] for p in passages]
    scored = lm.score_texts(ids, progress=progress)
    return tuple(
        TextRow(text=p.text, logprob=float(s.logprobs.sum()), n_tokens=len(s.logprobs))
        for p, s in zip(passages, scored, strict=True)
    )


def perplexity_ratio(base: Sequence[TextRow], patched: Sequence[TextRow]) -> float:
    """exp of the difference of total NLL per total tokens (metrics.md 3.7)."""
    tokens = sum(r.n_tokens for r in base)
    return float(np.exp((sum(r.logprob for r in base) - sum(r.logprob for r in patched)) / tokens))


def _perplexity(base: Sequence[TextRow], patched: Sequence[TextRow]) -> dict[str, Estimate]:
    tokens = [float(r.n_tokens) for r in base]
    b, p = ([r.logprob for r in rows] for rows in (base, patched))
    return {
        "base": estimate([b, tokens], lambda logprob, n: np.exp(-logprob / n)),
        "patched": estimate([p, tokens], lambda logprob, n: np.exp(-logprob / n)),
        "relative": estimate([b, p, tokens], lambda before, after, n: np.exp((before - after) / n)),
    }


def _surprise(lm: LM, rows: Sequence[ProbeRow], batch_size: int, progress: Progress | None) -> tuple[float | None, ...]:
    prompts = [lm.encode(row.prompt, chat=row.chat) for row in rows]
    found = surprises(lm, prompts, [row.generated_ids for row in rows], batch_size=batch_size)
    if progress:
        progress(len(rows))
    return tuple(found)


def _gibberish(rows: Rows, sets: Sequence[str]) -> list[float]:
    return [
        float(is_gibberish(row.generated_ids, surprise))
        for name in sets
        if name in rows.probes
        for row, surprise in zip(rows.probes[name], rows.surprise[name], strict=True)
    ]


def _right(rows: Sequence[ProbeRow], measure: str) -> list[float | None]:
    found = [row.generated_right if measure == "generated" else row.ranked_right for row in rows]
    return [None if value is None else float(value) for value in found]


def _touched(base: Rows, patched: Rows, name: str) -> list[float]:
    """1 where the patch changed anything at all: a probe's answer log-probability, a passage's likelihood."""
    if name in base.texts:
        return [float(b.logprob != p.logprob) for b, p in zip(base.texts[name], patched.texts[name], strict=True)]
    pairs = zip(base.probes[name], patched.probes[name], strict=True)
    return [float(b.answer_logprob != p.answer_logprob) for b, p in pairs]


def _ratio(numerator: Any, denominator: Any) -> Any:
    return numerator / denominator


def _difference(after: Any, before: Any) -> Any:
    return after - before
