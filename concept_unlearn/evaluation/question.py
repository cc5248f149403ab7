"""A probe as token ids: what the model is given, and what it might reply."""

from __future__ import annotations

from typing import NamedTuple

from ..data.encode import encode_answer, encode_question
from ..data.examples import Probe
from ..lm import LM


class Question(NamedTuple):
    """A probe as token ids."""

    prompt: list[int]
    is_reply: bool
    """True: answers are a message of their own and end with an end token. False: they continue the prompt."""


def encode_probe(lm: LM, probe: Probe) -> Question:
    if not probe.chat:
        prompt = f"{probe.prompt} {probe.opening}".strip() if probe.opening else probe.prompt
        return Question(lm.encode(prompt, chat=False), False)
    prompt_ids = encode_question(lm.tokenizer, probe.prompt, history=probe.history)
    opening = encode_answer(lm.tokenizer, probe.opening, after_space=False) if probe.opening else []
    return Question(prompt_ids + opening, True)


def encode_reply(lm: LM, probe: Probe, text: str) -> list[int]:
    """An answer or distractor of a probe, open at the end, as it follows what ``encode_probe`` gives."""
    return encode_answer(lm.tokenizer, text, after_space=not probe.chat or bool(probe.opening))
