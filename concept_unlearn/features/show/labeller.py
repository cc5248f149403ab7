"""A model behind an OpenAI-compatible address says in a few words what each feature is about."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ...component import Frozen
from ...endpoint import post_json
from ...errors import EndpointFailed, InvalidConfig
from ...files import write_atomically
from ...lm.embedded import cache_dir
from ...tracking import Progress
from .inspection import Context, Inspection, Shown

_TASK = (
    "A feature of a language model fires on some tokens of a text. Below are texts in which it fires most, the tokens "
    "on which it does so between « and », strongest first. Say what these have in common: the narrowest description "
    "that fits nearly all, in at most ten words, on one line, without a full stop. If nothing fits, say: unclear"
)
_MAX_LABEL = 120
_MARKED = 0.3
"""Tokens are marked whose activation is at least this share of the strongest one's."""


class Labeller(Frozen):
    """``Labeller(url="http://localhost:11434/v1", model="qwen3")(inspection)`` is the inspection with labels.

    Passages of the scope are sent to that address. What was asked once is not asked again: answers are kept on disk
    by the whole question, the model and the address.
    """

    url: str
    """Up to and with ``/v1``: ``/chat/completions`` is asked there."""
    model: str = Field(min_length=1)
    key_env: str | None = None
    """The environment variable that holds the key; none is sent without. The key is kept nowhere."""
    contexts: int = Field(8, ge=1)
    """Texts that are shown of a feature, of both sides together."""
    settings: dict[str, Any] = Field({"temperature": 0})
    """What else the request says."""
    timeout: float = Field(60.0, gt=0)
    """Seconds."""
    tries: int = Field(4, ge=1)
    pause: float = Field(1.0, ge=0)
    """Seconds before the second try; twice as many before each later one."""
    cache: Path | None = None
    """Folder of the answers; ``labels`` in this package's own cache where None."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError(f"an address begins with http:// or https://, as http://localhost:8000/v1; given: {url!r}")
        return url.rstrip("/").removesuffix("/chat/completions")

    def __call__(self, seen: Inspection, *, progress: Progress | None = None) -> Inspection:
        """A feature that never fires has no label. ``progress`` hears of features.

        Raises EndpointFailed, after which the answers so far are kept, and InvalidConfig for a key that is not there.
        """
        key, labels = self._key(), {}
        for shown in seen.features:
            if contexts := _strongest(shown, self.contexts):
                labels[shown.feature] = self._label(self._question(shown, contexts), key)
            if progress:
                progress(1)
        return seen.labelled(labels, by=self.model)

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env)):
            raise InvalidConfig(f"the key of {self.url} should be in ${self.key_env}, and that is not set")
        return key

    def _question(self, shown: Shown, contexts: list[Context]) -> dict[str, Any]:
        texts = [f"{i}. {_marked(context)}" for i, context in enumerate(contexts, 1)]
        if shown.up:
            texts.append("Words that it makes likelier: " + ", ".join(repr(t.text.strip()) for t in shown.up))
        said = [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(texts)}]
        return {"model": self.model, "messages": said, **self.settings}

    def _label(self, question: dict[str, Any], key: str | None) -> str:
        address = f"{self.url}/chat/completions"
        digest = hashlib.sha256(json.dumps([address, question], sort_keys=True).encode()).hexdigest()
        path = (self.cache or cache_dir() / "labels") / f"{digest}.txt"
        if path.is_file() and (kept := path.read_text().strip()):
            return kept
        answer = post_json(address, question, key=key, timeout=self.timeout, tries=self.tries, pause=self.pause)
        label = _read(answer, address)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, label.encode())
        return label


def _strongest(shown: Shown, n: int) -> list[Context]:
    both = (*shown.forget.contexts, *shown.retain.contexts)
    return sorted(both, key=lambda c: -c.acts[c.peak])[:n]


def _marked(context: Context) -> str:
    least = _MARKED * context.acts[context.peak]
    pieces = zip(context.tokens, context.acts, strict=True)
    return "".join(f"«{text}»" if act > 0 and act >= least else text for text, act in pieces).replace("»«", "").strip()


def _read(answer: Any, address: str) -> str:
    """The first line of what was said, without reasoning, quotes and full stop."""
    try:
        said = answer["choices"][0]["message"]["content"]
        lines = re.sub(r"<think>.*?(</think>|$)", "", said, flags=re.S).split("\n")
    except (KeyError, IndexError, TypeError):
        raise EndpointFailed(f"{address} answered something else than a message: {str(answer)[:200]}") from None
    label = next((line.strip(" \t\r\"'“”.*`") for line in lines if line.strip(" \t\r\"'“”.*`")), "")
    if not label:
        raise EndpointFailed(f"{address} answered with no word: {str(answer)[:200]}")
    return label[:_MAX_LABEL]
