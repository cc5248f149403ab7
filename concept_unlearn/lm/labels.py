"""Classification by a language model: a label's probability is that of the words that stand for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..data.encode import encode_answer
from ..errors import InvalidConfig
from .head import Ending


class Labels(Ending):
    """``labels(hidden)`` are logits of labels: p(label) = sum of the probabilities of its words' first tokens."""

    def __init__(self, ending: Ending, ids: Sequence[Sequence[int]]) -> None:
        """``ids`` are the first tokens of each label's words. Labels share out what all of them together have."""
        self._ending, self._ids, self.module = ending, [list(own) for own in ids], ending.module
        self.chunk = max(ending.chunk * len(ids) // ending.vocabulary, 1)

    @property
    def vocabulary(self) -> int:
        return len(self._ids)

    def __call__(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n label"]:
        logits = self._ending(hidden)
        return torch.stack([logits[:, own].logsumexp(-1) for own in self._ids], -1)

    def hidden(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq d"]:
        return self._ending.hidden(ids, mask)


def first_tokens(tokenizer: Any, labels: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """Of each label's words, as they begin a reply. Raises InvalidConfig where two labels begin alike."""
    found = [
        list(dict.fromkeys(encode_answer(tokenizer, word, after_space=False)[0] for word in words))
        for words in labels.values()
    ]
    owner: dict[int, str] = {}
    for name, own in zip(labels, found, strict=True):
        for token in own:
            if token in owner:
                raise InvalidConfig(
                    f"labels: words of {owner[token]!r} and {name!r} begin with the same token, "
                    f"{tokenizer.decode([token])!r}: give them words that begin differently"
                )
            owner[token] = name
    return found
