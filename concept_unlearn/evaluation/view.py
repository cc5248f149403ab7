"""What one model makes of the sets of a benchmark: plain data, from which every metric is a pure function.

A view knows no model and no device. It was observed (``observe``), read from disk, or made from the replies of a
black box; what a metric reads and the view does not hold is a clear error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

from ..data.examples import Passage, Probe
from ..errors import InvalidData, UnknownName

Read = Literal["answers", "paraphrases", "distractors", "moments", "gradnorm", "said", "surprise"]
"""What a metric may read of an example:

answers      token log-probabilities of each right answer; of a passage, of its text
paraphrases  of each paraphrase of the answer
distractors  of each distractor
moments      adds to ``answers`` what the model's own distribution is like at each token
gradnorm     size of the gradient of the first answer's mean NLL
said         the greedy reply
surprise     nats a token of that reply under the model without its patch
"""
SCORED: tuple[Read, ...] = ("answers", "paraphrases", "distractors")


class Tokens(NamedTuple):
    """One answer under one model, token by token, its end token included."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    """True where the token is the model's first choice; of equal ones the lowest id."""
    n_end: int = 0
    """How many of the last tokens are end tokens: 0 or 1."""
    mean: tuple[float, ...] = ()
    """sum p log p at each token; only where moments were asked for."""
    std: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        return len(self.logprobs)

    @property
    def nll(self) -> float:
        return -sum(self.logprobs)

    @property
    def mean_logprob(self) -> float | None:
        """None of an answer without a token."""
        return sum(self.logprobs) / self.n if self.n else None

    @property
    def body(self) -> Tokens:
        """Without the end token."""
        return self.cut(self.n - self.n_end)

    def cut(self, n: int) -> Tokens:
        n_end = max(self.n_end - max(self.n - n, 0), 0)
        return Tokens(self.logprobs[:n], self.greedy[:n], n_end, self.mean[:n], self.std[:n])

    def as_json(self) -> list[Any]:
        return [self.logprobs, [int(g) for g in self.greedy], self.n_end, self.mean, self.std]

    @classmethod
    def of_json(cls, data: Sequence[Any]) -> Self:
        logprobs, greedy, n_end, mean, std = data
        return cls(tuple(logprobs), tuple(map(bool, greedy)), n_end, tuple(mean), tuple(std))


class Reply(NamedTuple):
    ids: tuple[int, ...]
    """Without the end token; none of a black box that gives only text."""
    text: str


@dataclass(frozen=True)
class Asked:
    """One set of a benchmark: examples, and how they are put to a model."""

    examples: tuple[Probe | Passage, ...]
    max_new_tokens: int = 200
    """Of a reply to a user's message."""
    max_cloze_tokens: int | None = None
    """Of the continuation of a prompt that is no message; as many where None."""
    stop: tuple[str, ...] = ()
    """A reply ends before the first of these."""
    max_tokens: int | None = None
    """Of a passage."""

    def reply_tokens(self, probe: Probe) -> int:
        return self.max_new_tokens if probe.chat or self.max_cloze_tokens is None else self.max_cloze_tokens


@dataclass(frozen=True)
class Seen:
    """One set as one model sees it. Every sequence here has an entry an example, in order."""

    name: str
    asked: Asked
    records: tuple[Mapping[str, Any], ...]
    """Of each example what was read, by the name of the read."""

    @property
    def examples(self) -> tuple[Probe | Passage, ...]:
        return self.asked.examples

    @property
    def probes(self) -> tuple[Probe, ...]:
        found = tuple(e for e in self.examples if isinstance(e, Probe))
        if len(found) != len(self.examples):
            raise InvalidData(f"set {self.name!r} holds passages, and this metric asks questions")
        return found

    @cached_property
    def answers(self) -> tuple[tuple[Tokens, ...], ...]:
        return self._of("answers")

    @cached_property
    def paraphrases(self) -> tuple[tuple[Tokens, ...], ...]:
        return self._of("paraphrases")

    @cached_property
    def distractors(self) -> tuple[tuple[Tokens, ...], ...]:
        return self._of("distractors")

    @cached_property
    def said(self) -> tuple[Reply, ...]:
        return self._of("said")

    @cached_property
    def surprise(self) -> tuple[float | None, ...]:
        return self._of("surprise")

    @cached_property
    def gradnorm(self) -> tuple[Mapping[str, float] | None, ...]:
        return self._of("gradnorm")

    def options(self, i: int) -> list[tuple[str, Tokens]]:
        """Of a probe all that may be chosen with how it scored, in the order in which it is offered."""
        probe = self.examples[i]
        assert isinstance(probe, Probe)
        tokens = (*self.answers[i], *self.distractors[i])
        found = dict(zip((*probe.answers, *probe.distractors), tokens, strict=True))
        return [(text, found[text]) for text in probe.options or found]

    def holds(self, read: Read) -> bool:
        if read == "moments":
            return self.holds("answers") and all(t.mean or not t.n for group in self.answers for t in group)
        return all(read in record for record in self.records)

    def require(self, read: Read) -> None:
        if not self.holds(read):
            raise InvalidData(f"of set {self.name!r} this view holds no {read}: {_WHY[read]}")

    def n_tokens(self, read: Read) -> list[list[int]]:
        """Of each answer, paraphrase or distractor of each example."""
        return [[tokens.n for tokens in group] for group in self._of(read)]

    def _of(self, read: Read) -> tuple[Any, ...]:
        self.require(read)
        return tuple(record[read] for record in self.records)


_WHY: dict[Read, str] = dict.fromkeys(
    (*SCORED, "moments", "gradnorm"), "it needs a model whose log-probabilities can be read, or another observation"
) | {"said": "nothing was generated", "surprise": "its replies were not judged by the model without the patch"}


@dataclass(frozen=True)
class View:
    """What one model made of a benchmark, with those it is compared with."""

    model: str
    sets: Mapping[str, Seen]
    original: View | None = None
    """The model before it unlearned anything."""
    retrained: View | None = None
    """A model that never saw what is to be forgotten."""
    seconds: float = 0.0
    """What observing took."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """Work counted while observing: tokens read, tokens written, passes."""

    def __getitem__(self, name: str) -> Seen:
        if name not in self.sets:
            raise UnknownName("set", name, self.sets)
        return self.sets[name]

    def beside(self, *, original: View | None = None, retrained: View | None = None) -> View:
        """The same view, compared with these.

        Raises InvalidData where one of them was asked something else, or splits the answers into other tokens.
        """
        for role, other in (("original", original), ("retrained", retrained)):
            if other is not None:
                self._check_comparable(role, other)
        return replace(self, original=original or self.original, retrained=retrained or self.retrained)

    def _check_comparable(self, role: str, other: View) -> None:
        who, shared = f"the {role} model, {other.model!r},", sorted(self.sets.keys() & other.sets.keys())
        if not shared:
            raise InvalidData(f"{who} was asked none of the sets {', '.join(self.sets)}: it is of another benchmark")
        for name in shared:
            ours, theirs = self[name], other[name]
            if ours.asked != theirs.asked:
                raise InvalidData(
                    f"{who} was asked another set {name!r}: it is of another benchmark, or of other settings of it"
                )
            for read in SCORED:
                if ours.holds(read) and theirs.holds(read) and ours.n_tokens(read) != theirs.n_tokens(read):
                    raise InvalidData(f"{who} has {read} of other lengths in set {name!r}: it is of another tokenizer")

    @classmethod
    def of_replies(cls, model: str, asked: Mapping[str, Asked], said: Mapping[str, Sequence[str]]) -> View:
        """A black box: nothing but what it replied to each example of each set."""
        sets = {}
        for name, replies in said.items():
            if name not in asked:
                raise UnknownName("set", name, asked)
            if len(replies) != len(asked[name].examples):
                raise InvalidData(
                    f"set {name!r} asks {len(asked[name].examples)} questions; given {len(replies)} replies"
                )
            sets[name] = Seen(name, asked[name], tuple({"said": Reply((), text)} for text in replies))
        return cls(model, sets)
