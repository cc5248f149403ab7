"""One record a probe: what the model wrote, how it ranks the answers, how sure it is of the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..component import Frozen
from ..data.encode import encode_answer, has_chat_template
from ..data.examples import Probe
from ..lm import LM
from ..tracking import Progress
from .fluency import is_repetitive

CLOZE_TOKENS, CHAT_TOKENS = 10, 32
"""How far into a generation an accepted answer may stand."""
_BORROWED_DISTRACTORS = 7


class ProbeRow(Frozen):
    """Right or wrong by two measures, and the numbers behind them."""

    prompt: str
    chat: bool
    answers: tuple[str, ...]
    generation: str
    generated_right: bool
    """An accepted answer stands in the first words of the greedy continuation."""
    ranked_right: bool | None
    """An accepted answer is likelier, per byte, than every distractor; None where there is no distractor."""
    answer_logprob: float
    """Of the likeliest accepted answer, in nats a token."""
    repetitive: bool
    generated_ids: tuple[int, ...]


def probe_rows(
    lm: LM, probes: Sequence[Probe], *, batch_size: int = 32, progress: Progress | None = None
) -> list[ProbeRow]:
    """``progress`` hears of each probe twice: when its answers are scored, and when it has been answered."""
    chat, prompts = _prompts(lm, probes)
    candidates = [(*p.answers, *_distractors(p, probes)) for p in probes]
    encoded = [
        [encode_answer(lm.tokenizer, text, after_space=not c) for text in group]
        for group, c in zip(candidates, chat, strict=True)
    ]
    scored = lm.score(prompts, encoded, batch_size=batch_size, progress=progress)
    written = _replies(lm, prompts, chat, batch_size, progress)
    rows = []
    for probe, is_chat, group, texts, reply in zip(probes, chat, scored, candidates, written, strict=True):
        n = len(probe.answers)
        per_byte = [float(s.logprobs.sum()) / len(t.encode()) for s, t in zip(group, texts, strict=True)]
        generation = lm.tokenizer.decode(reply, skip_special_tokens=True)
        rows.append(
            ProbeRow(
                prompt=probe.prompt,
                chat=is_chat,
                answers=probe.answers,
                generation=generation,
                generated_right=probe.answered_by(generation),
                ranked_right=max(per_byte[:n]) > max(per_byte[n:]) if len(texts) > n else None,
                answer_logprob=max(float(s.logprobs.mean()) for s in group[:n]),
                repetitive=is_repetitive(reply),
                generated_ids=tuple(reply),
            )
        )
    return rows


class Reply(NamedTuple):
    prompt: list[int]
    ids: list[int]
    right: bool
    """``generated_right`` of a ``ProbeRow``."""


def replies(lm: LM, probes: Sequence[Probe], *, batch_size: int = 32, progress: Progress | None = None) -> list[Reply]:
    """What the model writes, for whoever needs nothing else. ``progress`` hears of each probe."""
    chat, prompts = _prompts(lm, probes)
    written = _replies(lm, prompts, chat, batch_size, progress)
    return [
        Reply(prompt, ids, probe.answered_by(lm.tokenizer.decode(ids, skip_special_tokens=True)))
        for probe, prompt, ids in zip(probes, prompts, written, strict=True)
    ]


def _prompts(lm: LM, probes: Sequence[Probe]) -> tuple[list[bool], list[list[int]]]:
    chat = [p.chat and has_chat_template(lm.tokenizer) for p in probes]
    return chat, [lm.encode(p.prompt, chat=c) for p, c in zip(probes, chat, strict=True)]


def _replies(
    lm: LM, prompts: Sequence[list[int]], chat: Sequence[bool], batch_size: int, progress: Progress | None
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for is_chat, length in ((False, CLOZE_TOKENS), (True, CHAT_TOKENS)):
        mine = [i for i, c in enumerate(chat) if c == is_chat]
        ids = lm.generate_ids(
            [prompts[i] for i in mine], max_new_tokens=length, batch_size=batch_size, progress=progress
        )
        for i, reply in zip(mine, ids, strict=True):
            found[i] = reply
    return found


def _distractors(probe: Probe, probes: Sequence[Probe]) -> tuple[str, ...]:
    """Its own, or else the first answers of other probes of the set, as wrong as they are for this one."""
    if probe.distractors:
        return probe.distractors
    others = dict.fromkeys(p.answers[0] for p in probes if not probe.answered_by(p.answers[0]))
    return tuple(others)[:_BORROWED_DISTRACTORS]
