"""Where public code counts otherwise than the definitions say, for numbers that are to stand beside its tables."""

from __future__ import annotations

from typing import Literal

from ..view import Tokens

Compat = Literal["open-unlearning"]
EndToken = Literal["own", "peer"]
"""own: an answer is counted without the end token that was added to it, if one was. peer: without its last token,
whatever that is, which on running text is a real one."""


def without_end(tokens: Tokens, end: EndToken = "own") -> Tokens:
    return tokens.body if end == "own" else tokens.cut(max(tokens.n - 1, 0))._replace(n_end=0)
