"""Token ids as they look in a text, each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Pieces:
    """``pieces([3, 5])`` -> ``(" the", " king")``. Read off behind an anchor: alone, SentencePiece drops a space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._head = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.one(i) for i in ids)

    def one(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([*self._anchor, token])[len(self._head) :]
        return self._known[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
