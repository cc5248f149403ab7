"""What a scope is to a trainer: rows of token ids, of which the answers are supervised, and who is asked what when."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.encode import encode_answer, encode_question, encode_text, end_of_answer, pad
from ..data.examples import Passage
from ..errors import InvalidData
from ..step import UNSUPERVISED, Batch

REFUSALS = Path(__file__).parents[1] / "data" / "refusals.txt"


class Row(NamedTuple):
    ids: tuple[int, ...]
    n_prompt: int
    """Tokens before the first supervised one, at least 1."""


@dataclass
class Encoder:
    """Passages to rows: a reply as prompt, answer and one token that ends it; plain text as it is."""

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...] = ()
    """Where each text is one of these, what follows the prompt is its number, which no position reads as a token."""
    cut_prompts: int = 0
    cut_answers: int = 0
    _known: dict[tuple[str | None, str], Row] = field(default_factory=dict)

    def row(self, prompt: str | None, text: str) -> Row:
        key = (prompt, text)
        if key not in self._known:
            self._known[key] = self._encode(prompt, text)
        return self._known[key]

    def warn(self) -> None:
        if self.cut_prompts or self.cut_answers:
            warnings.warn(
                f"cut to max_length {self.max_length}: the beginning of {self.cut_prompts} prompts and the end of "
                f"{self.cut_answers} texts",
                stacklevel=3,
            )

    def _encode(self, prompt: str | None, text: str) -> Row:
        if self.labels:
            return self._labelled(prompt, text)
        if prompt is None:
            ids = encode_text(self.tokenizer, text)
            self.cut_answers += len(ids) > self.max_length
            if len(ids) < 2:
                raise InvalidData(f"nothing predicts a text of a single token: {text!r}")
            return Row(tuple(ids[: self.max_length]), 1)
        question = encode_question(self.tokenizer, prompt)
        answer = encode_answer(self.tokenizer, text, after_space=False) + end_of_answer(self.tokenizer)
        room = max(self.max_length - len(answer), 1)
        self.cut_prompts += len(question) > room
        self.cut_answers += len(answer) > self.max_length - 1
        question = question[-room:]
        return Row(tuple((question + answer)[: self.max_length]), len(question))

    def _labelled(self, prompt: str | None, text: str) -> Row:
        if prompt is None or text not in self.labels:
            raise InvalidData(
                f"a passage to classify has a prompt, and its text is one of {', '.join(self.labels)}; given: "
                f"{text[:60]!r}{' without a prompt' if prompt is None else ''}"
            )
        question = encode_question(self.tokenizer, prompt)
        self.cut_prompts += len(question) > self.max_length - 1
        question = question[-(self.max_length - 1) :]
        return Row((*question, self.labels.index(text)), len(question))


@dataclass(frozen=True)
class Split:
    """Rows, and which of them an item is in an epoch: items of one side are the same in all of its splits."""

    rows: tuple[Row, ...]
    by_epoch: tuple[tuple[int, ...], ...] = ()
    """For each epoch the row of each item, around and around; none where row i is item i."""

    def row_of(self, item: int, epoch: int) -> int:
        return self.by_epoch[epoch % len(self.by_epoch)][item] if self.by_epoch else item

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        ids, mask = pad([self.rows[i].ids for i in rows], side="right", device=device)
        labels = ids.masked_fill(~mask, UNSUPERVISED)
        for i, row in enumerate(rows):
            labels[i, : self.rows[row].n_prompt] = UNSUPERVISED
        return Batch(ids, labels, mask, tuple(rows))

    @cached_property
    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self.rows]


def plain(encoder: Encoder, passages: Sequence[Passage]) -> Split:
    return Split(tuple(encoder.row(p.prompt, p.text) for p in passages))


def refused(encoder: Encoder, passages: Sequence[Passage], *, epochs: int, seed: int) -> Split:
    """The same prompts, each answered with a refusal that is drawn anew, by (seed, item, epoch)."""
    refusals = REFUSALS.read_text(encoding="utf-8").splitlines()
    prompts = [_prompt(passage) for passage in passages]
    drawn = [
        [encoder.row(prompt, random.Random(f"{seed} {i} {epoch}").choice(refusals)) for i, prompt in enumerate(prompts)]
        for epoch in range(epochs)
    ]
    index = {row: i for i, row in enumerate(dict.fromkeys(row for rows in drawn for row in rows))}
    return Split(tuple(index), tuple(tuple(index[row] for row in rows) for rows in drawn))


def answered(encoder: Encoder, passages: Sequence[Passage], answers: Iterable[str]) -> Split:
    """The same prompts, each with another answer."""
    return Split(tuple(encoder.row(_prompt(p), a) for p, a in zip(passages, answers, strict=True)))


def order(n: int, *, seed: int, epoch: int) -> list[int]:
    """Items in the order of an epoch."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))
    found: list[int] = torch.randperm(n, generator=generator).tolist()
    return found


def _prompt(passage: Passage) -> str:
    if passage.prompt is None:
        raise InvalidData(f"other answers need questions, and this passage has no prompt: {passage.text[:60]!r}")
    return passage.prompt
