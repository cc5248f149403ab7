"""The two kinds of example: a passage is text to learn from, a probe is a question with known answers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ..component import Frozen, build
from ..errors import ConceptUnlearnError, InvalidData

Example = TypeVar("Example", bound="Frozen")


class Passage(Frozen):
    """Text to learn from: of the concept, or of what is kept."""

    text: str
    prompt: str | None = None
    """The user's message that the text replies to; none for plain prose."""
    alternates: tuple[str, ...] = ()
    """Other replies, plausible and wrong, for methods that teach one in place of the text."""
    attributes: tuple[tuple[str, str], ...] = ()
    """What is known about it, to tell passages apart: given and written down as a mapping such as {author: Kafka}."""

    @field_validator("attributes", mode="before")
    @classmethod
    def _in_order(cls, given: Any) -> Any:
        if given is None:  # as a table has it whose other rows have some
            return ()
        if not isinstance(given, Mapping):
            return given
        known = {str(name): value for name, value in given.items() if value is not None}
        if odd := [name for name, value in known.items() if not isinstance(value, str | int | float)]:
            raise ValueError(f"an attribute is text or a number; given for {odd[0]!r}: {known[odd[0]]!r}")
        return tuple(sorted((name, str(value)) for name, value in known.items()))

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Attributes as a mapping, and not at all where there are none."""
        found = {key: value for key, value in handler(self).items() if key != "attributes"}
        return found | ({"attributes": dict(self.attributes)} if self.attributes else {})

    @field_validator("text")
    @classmethod
    def _has_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty")
        return text

    @property
    def key(self) -> str:
        """What decides which half of a scope it falls into."""
        return self.prompt or self.text

    def attribute(self, name: str) -> str | None:
        return dict(self.attributes).get(name)


class Probe(Frozen):
    """A question with known answers: of the concept, or of what is kept."""

    prompt: str
    answers: tuple[str, ...]
    """Any of them is right."""
    distractors: tuple[str, ...] = ()
    """Wrong answers of the same kind; without any, the answers of the other probes of the set serve."""
    chat: bool = False
    """True: the prompt is a user's message. False: the answer continues the prompt."""
    paraphrases: tuple[str, ...] = ()
    """The right answer in other words: what distractors made from it are compared with."""
    wordings: tuple[str, ...] = ()
    """The same question in other words."""
    options: tuple[str, ...] = ()
    """All that may be chosen, in the order in which they are offered; answers and distractors are among them."""
    history: tuple[str, ...] = ()
    """Messages of a chat before the prompt: the user's, the reply to it, and so on."""
    opening: str = ""
    """What the reply has been made to begin with; the answers are what follows."""

    @field_validator("answers", "distractors", "paraphrases", "wordings", "options", "history", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("answers")
    @classmethod
    def _has_answers(cls, answers: tuple[str, ...]) -> tuple[str, ...]:
        if not answers or not all(normalise(a).strip() for a in answers):
            raise ValueError("every probe needs an answer with at least one letter or digit")
        return answers

    @field_validator("prompt")
    @classmethod
    def _has_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        right = {normalise(text) for text in self.paraphrases}
        if both := [text for text in self.distractors if normalise(text) in right]:
            raise ValueError(f"{both[0]!r} is both a paraphrase of the answer and a distractor")
        if odd := set(self.options) ^ {*self.answers, *self.distractors} if self.options else set():
            raise ValueError(f"options are the answers and distractors in order; {min(odd)!r} is in only one of them")
        if self.history and not self.chat:
            raise ValueError("a history goes before a message: set chat, or write it into the prompt")
        if len(self.history) % 2:
            raise ValueError("a history ends with a reply: it has an even number of messages")
        return self

    @property
    def key(self) -> str:
        return self.prompt

    def answered_by(self, text: str) -> bool:
        """True if an accepted answer stands in ``text`` as whole words, whatever the case and accents."""
        said = normalise(text)
        return any(normalise(answer) in said for answer in self.answers)


def normalise(text: str) -> str:
    """Lower case, no accents, words of letters and digits between single spaces, one at each end."""
    plain = unicodedata.normalize("NFKD", text.lower())
    words = re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))
    return f" {' '.join(words)} "


def to_passage(record: Any) -> Passage:
    """A string, ``{text, prompt?, attributes?}`` or ``{question, answer, attributes?}``."""
    if isinstance(record, str):
        record = {"text": record}
    if isinstance(record, dict) and {"question", "answer"} <= set(record):
        record = {"prompt": record["question"], "text": record["answer"], "attributes": record.get("attributes")}
    return record if isinstance(record, Passage) else _from_dict(Passage, record)


def to_probe(record: Any) -> Probe:
    """``{prompt, answers, distractors?, chat?}``, or ``{question, answer}`` as a chat probe."""
    if isinstance(record, dict) and {"question", "answer"} <= set(record):
        record = {"prompt": record["question"], "answers": record["answer"], "chat": True}
    return record if isinstance(record, Probe) else _from_dict(Probe, record)


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers, from 1, and records. Raises InvalidData that names the file and the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except json.JSONDecodeError as error:
                raise InvalidData(f"{path}, line {number}: not JSON ({error.msg})") from None
            except UnicodeDecodeError as error:
                raise InvalidData(f"{path}, line {number}: not UTF-8 ({error.reason})") from None


def write_jsonl(path: Path, records: Iterable[Frozen]) -> None:
    lines = (json.dumps(r.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _from_dict(kind: type[Example], record: Any) -> Example:
    if not isinstance(record, dict):
        raise InvalidData(f"a {kind.__name__.lower()} is a mapping; given: {record!r}")
    try:
        return build(kind, record)
    except ConceptUnlearnError as error:
        raise InvalidData(str(error)) from None
