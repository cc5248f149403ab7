"""What a client may ask of a scope: prompts with known answers, and prompts that must go on as before."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..data.encode import encode_answer, encode_prompt, encode_question, encode_text
from ..data.examples import Probe
from ..data.scope import IN_SCOPE, OUT_OF_SCOPE, Scope
from ..dictionaries import Slice, direction
from ..errors import EmptyData
from ..features import difference_of_means
from ..gates import Always, Gate, ProbeGate
from ..journal import Journal
from ..lm import LM
from ..lm.fingerprint import checksum, fingerprint
from ..lm.oracle import EMBEDDING
from ..patches import PrefixPatch, PromptPatch
from .base import Method, Study

_LONGEST = 256
"""Tokens of a passage that are asked about, from its beginning."""


class Question(NamedTuple):
    ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    """Any of them is right."""
    distractors: tuple[tuple[int, ...], ...] = ()
    chat: bool = False


def forget_questions(lm: LM, scope: Scope) -> list[Question]:
    """Probes in scope, and passages that reply to a message. Raises EmptyData where there are none."""
    found = [_of_probe(lm, probe) for name in IN_SCOPE for probe in getattr(scope, name)]
    found += [
        _of_message(lm, passage.prompt, (passage.text,), passage.alternates)
        for passage in scope.forget
        if passage.prompt is not None
    ]
    if not found:
        raise EmptyData(
            f"scope {scope.name!r} has no probe in scope and no forget passage with a prompt, so there is no question "
            "to ask the model: give in_easy or in_hard"
        )
    return found


def retain_questions(lm: LM, scope: Scope) -> list[Question]:
    """Probes out of scope, and passages to keep: as messages, or as plain text, as they begin."""
    found = [_of_probe(lm, probe) for name in OUT_OF_SCOPE for probe in getattr(scope, name)]
    for passage in (*scope.near, *scope.retain):
        plain = passage.prompt is None
        ids = encode_text(lm.tokenizer, passage.text) if plain else encode_question(lm.tokenizer, passage.prompt or "")
        found.append(Question(tuple(ids[:_LONGEST]), chat=not plain))
    return found


def _of_probe(lm: LM, probe: Probe) -> Question:
    if probe.chat:
        return _of_message(lm, probe.prompt, probe.answers, probe.distractors, probe.history, probe.opening)
    text = f"{probe.prompt} {probe.opening}" if probe.opening else probe.prompt
    ids = encode_prompt(lm.tokenizer, text, chat=False)
    return Question(tuple(ids), *_encoded(lm, probe.answers, probe.distractors, chat=False), chat=False)


def _of_message(
    lm: LM,
    message: str,
    answers: Sequence[str],
    distractors: Sequence[str],
    history: Sequence[str] = (),
    opening: str = "",
) -> Question:
    ids = encode_question(lm.tokenizer, message, history=history)
    if opening:
        ids = ids + encode_answer(lm.tokenizer, opening, after_space=False)
    return Question(tuple(ids), *_encoded(lm, answers, distractors, chat=not opening), chat=True)


def _encoded(
    lm: LM, answers: Sequence[str], distractors: Sequence[str], *, chat: bool
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    right, wrong = (
        tuple(tuple(encode_answer(lm.tokenizer, text, after_space=not chat)) for text in texts)
        for texts in (answers, distractors)
    )
    return right, wrong


def fitted_gate(study: Study, gate: Gate) -> tuple[Gate, Slice | None]:
    """The gate, and what it reads the embeddings by: a probe of its own, or the difference of means of the scope."""
    if isinstance(gate, Always):
        return gate, None
    if isinstance(gate, ProbeGate):
        nothing = torch.zeros(study.lm.d_model)
        return study.gate(gate, direction(EMBEDDING, nothing, nothing))  # it brings its own sensor
    sensor = difference_of_means(study.moments(EMBEDDING))
    fitted, own = study.gate(gate, sensor)
    return fitted, own or sensor


def flagged(
    guard: PromptPatch | PrefixPatch, lm: LM, questions: Sequence[Question], *, needed: bool = True
) -> list[Question]:
    """Those that the guard lets its edit reach. Where they are needed, raises EmptyData for none and warns of few."""
    if not questions:
        return []
    flags = guard.flagged(lm, [q.ids for q in questions]).tolist()
    found = [q for q, flag in zip(questions, flags, strict=True) if flag]
    if needed and not found:
        raise EmptyData(
            f"the {guard.gate.kind} gate flags none of the {len(questions)} prompts to forget: give more of them, or a "
            "greater alpha"
        )
    if needed and 2 * len(found) < len(questions):
        warnings.warn(
            f"the {guard.gate.kind} gate flags {len(found)} of {len(questions)} prompts to forget: the others will be "
            "answered as before",
            stacklevel=2,
        )
    return found


def journal_of(method: Method, study: Study, asked: Sequence[Question]) -> Journal | None:
    """Where a study has a folder: that of this method on this model, about these questions."""
    if study.folder is None:
        return None
    what = {
        "model": fingerprint(study.lm.model),
        "weights": checksum(study.lm.model),
        "dtype": str(study.lm.dtype),
        "method": method.spec(),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }
    journal = Journal(study.folder, what, name=method.kind)
    journal.claim()
    return journal
