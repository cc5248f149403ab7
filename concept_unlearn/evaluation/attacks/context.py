"""More context: what is to be forgotten given back by example, a question drowned in other text or said in pieces."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count

from pydantic import Field

from ...data.examples import Passage, Probe, normalise
from ...lm import LM
from .base import Rewording, Victim, _OtherPrompts
from .jailbreak import after, before, each

_WORDS = 64
"""Of a passage that is shown as an example."""


class InContext(_OtherPrompts):
    """Relearning without training: other passages to be forgotten before the question (arXiv 2402.16835, 2407.00106).

    A question with its answer is a turn of the chat, or a line before what is no chat; plain prose stands before the
    question. None holds the answer that is asked for.
    """

    k: int = Field(4, gt=0)
    seed: int = 0

    def rewordings(self, victim: Victim) -> Iterable[Rewording]:
        yield Rewording(partial(self._shown, victim.scope.forget))

    def _shown(self, pool: Sequence[Passage], probes: Sequence[Probe]) -> list[Probe]:
        return [self._behind_examples(pool, p, i) for i, p in enumerate(probes)]

    def _behind_examples(self, pool: Sequence[Passage], probe: Probe, index: int) -> Probe:
        drawn = random.Random(f"{self.seed} {index}").sample(range(len(pool)), len(pool))
        others = (pool[i] for i in drawn if _is_other(pool[i], probe))
        chosen = [passage for _, passage in zip(range(self.k), others, strict=False)]
        turns = tuple(t for p in chosen if p.prompt is not None and probe.chat for t in (p.prompt, p.text))
        texts = [_as_text(p) for p in chosen if p.prompt is None or not probe.chat]
        return after(before(probe, "\n\n".join(texts)) if texts else probe, turns)


class Dilute(_OtherPrompts):
    """Retained text before the question: a gate that looks at a share of the prompt no longer sees what is asked.

    Several lengths make a curve; those that do not fit the model are left out.
    """

    tokens: tuple[int, ...] = Field((64, 256), min_length=1)
    """How much, as the model counts it."""

    def rewordings(self, victim: Victim) -> Iterable[Rewording]:
        for n in self.tokens:
            yield Rewording(partial(self._diluted, victim, n), {"tokens": n}, n)

    def _diluted(self, victim: Victim, n: int, probes: Sequence[Probe]) -> list[Probe]:
        pool = [p.text for p in victim.scope.retain]
        return [before(p, _filler(victim.lm, pool, i, n)) for i, p in enumerate(probes)]


class MultiTurn(_OtherPrompts):
    """The question in pieces, a turn of the chat each; what is no chat is broken into lines."""

    turns: int = Field(3, gt=1)
    """As many, or as many as the question has words."""

    def rewordings(self, victim: Victim) -> Iterable[Rewording]:
        yield Rewording(each(self._split))

    def _split(self, probe: Probe) -> Probe:
        words = probe.prompt.split()
        n = min(self.turns, len(words))
        if n < 2:
            return probe
        pieces = [" ".join(words[i * len(words) // n : (i + 1) * len(words) // n]) for i in range(n)]
        if not probe.chat:
            return probe.model_copy(update={"prompt": " ...\n\n... ".join(pieces)})
        parts = [f"Part {i} of {n} of my question: {piece}" for i, piece in enumerate(pieces, 1)]
        told = tuple(turn for part in parts[:-1] for turn in (part, "Go on."))
        last = f"{parts[-1]}\n\nNow answer the whole question."
        return probe.model_copy(update={"history": (*probe.history, *told), "prompt": last})


def _is_other(passage: Passage, probe: Probe) -> bool:
    asked = {normalise(text) for text in (probe.prompt, *probe.wordings)}
    return normalise(passage.prompt or "") not in asked and not probe.answered_by(
        f"{passage.prompt or ''} {passage.text}"
    )


def _as_text(passage: Passage) -> str:
    if passage.prompt is not None:
        return f"{passage.prompt} {passage.text}"
    return " ".join(passage.text.split()[:_WORDS])


def _filler(lm: LM, pool: Sequence[str], start: int, n: int) -> str:
    """``n`` tokens of one text after another, from text ``start`` on and around."""
    tokenizer, ids = lm.tokenizer, []
    for i in count(start):
        ids += tokenizer(f"{pool[i % len(pool)]}\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= n:
            break
    return str(tokenizer.decode(ids[:n], skip_special_tokens=True)).strip()
