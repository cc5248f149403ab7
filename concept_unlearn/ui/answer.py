"""A question on its way: asked of the model as it is, then of the patched one, and read by the page meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from ..data.encode import common_prefix, encode_question
from ..features.show.pieces import Pieces
from ..lm import LM
from ..patches import Explanation, Patch
from ..patches.explain import Guess, explain_ids
from ..patches.watch import Fired, Watch
from .stream import Next, Spelling, stream

State = Literal["waiting", "writing", "done", "stopped", "failed"]
GUESSES = 8


@dataclass
class Said:
    """A token of a reply."""

    text: str
    guesses: tuple[Guess, ...]
    """What the model could have said there, the likeliest first."""
    fired: tuple[Fired, ...] = ()


@dataclass
class Reply:
    """What one side says. Written by the thread that runs the model, in steps that a reader may come between."""

    history: tuple[str, ...] = ()
    """Messages and replies before this one, in turn."""
    said: list[Said] = field(default_factory=list)
    state: State = "waiting"

    @property
    def text(self) -> str:
        return "".join(said.text for said in self.said)


@dataclass(eq=False)
class Question:
    """One message, two replies. ``stop()`` ends it within a token, whoever calls it."""

    message: str
    patch: Patch
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    original: Reply = field(default_factory=Reply)
    patched: Reply = field(default_factory=Reply)
    explanation: Explanation | None = None
    """Of the prompt as the patched side reads it."""
    head: int = 0
    """Tokens of it that every chat begins with."""
    error: str | None = None
    future: Future[None] | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self._stopped.set()

    @property
    def finished(self) -> bool:
        return self.future is not None and self.future.done()

    def ask(self, lm: LM) -> None:
        """In the thread that runs the model; what fails is told in ``error``."""
        try:
            if not self._stopped.is_set():
                ids = encode(lm, self.message, self.patched.history)
                self.head = len(common_prefix(ids, lm.chat_head))
                self.explanation = explain(self, lm, self.patch)
            for reply, is_patched in ((self.original, False), (self.patched, True)):
                if self._stopped.is_set():
                    reply.state = "stopped"
                else:
                    self._write(lm, reply, is_patched)
        except Exception as error:  # a chat template's, a device's: whatever it is, the page has to tell it
            self.error = f"{type(error).__name__}: {error}"
            for reply in (self.original, self.patched):
                reply.state = reply.state if reply.state == "done" else "failed"

    def _write(self, lm: LM, reply: Reply, is_patched: bool) -> None:
        reply.state = "writing"
        ids = encode(lm, self.message, reply.history)
        spelling, pieces = Spelling(lm.tokenizer), Pieces(lm.tokenizer)
        with Watch(self.patch, lm).on(patched=is_patched) as watch:
            for step in stream(
                lm, ids, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
            ):
                if reply.said:  # the pass that has just been made read the token before this one
                    reply.said[-1].fired = watch.fired(ids)[0]
                ids = [step.id]
                reply.said.append(Said(spelling(step.id), _guesses(step, pieces)))
                if self._stopped.is_set():
                    break
        if reply.said:
            reply.said[-1].text += spelling.rest()
        reply.state = "stopped" if self._stopped.is_set() else "done"


def encode(lm: LM, message: str, history: Sequence[str]) -> list[int]:
    """A model without a chat template goes on with the text."""
    if lm.is_chat:
        return encode_question(lm.tokenizer, message, history=history)
    return lm.encode("".join((*history, message)), chat=False)


def explain(question: Question, lm: LM, patch: Patch) -> Explanation:
    """What a patch does to the prompt of a question, as its patched side reads it."""
    ids = encode(lm, question.message, question.patched.history)
    return explain_ids(patch, lm, ids, prompt=question.message, guesses=GUESSES)


def _guesses(step: Next, pieces: Pieces) -> tuple[Guess, ...]:
    top = step.logprobs.topk(min(GUESSES, len(step.logprobs)))
    pairs: Sequence[tuple[int, float]] = list(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True))
    return tuple(Guess(text=pieces.one(i), probability=p) for i, p in pairs)
