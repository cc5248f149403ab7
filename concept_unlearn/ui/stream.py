"""Text from a model one token at a time, so that whoever reads along can stop it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InvalidData, NotExact
from ..lm import LM
from ..lm.context import answering
from ..lm.forward import forward, log_softmax, new_cache
from ..lm.locate import root


class Next(NamedTuple):
    """A token that the model wrote, and what it could have written there."""

    id: int
    logprobs: Float[Tensor, " vocab"]


def stream(
    lm: LM, prompt: Sequence[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[Next]:
    """What ``LM.generate_ids`` writes, up to and without the first end token; greedy at ``temperature`` 0.

    A token is read by the model when the next one is asked for. Raises InvalidData for a prompt that leaves no room,
    NotExact for an encoder-decoder.
    """
    config: Any = getattr(root(lm.model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise NotExact(f"{lm.name} is an encoder-decoder: only decoders are streamed")
    room = lm.context - len(prompt)
    if room < 1:
        raise InvalidData(f"the prompt has {len(prompt)} tokens, and {lm.name} reads {lm.context} with its answer")
    generator = torch.Generator(lm.device).manual_seed(seed)
    cache, ids, total, end_ids = new_cache(lm.model, 1), list(prompt), len(prompt), set(lm.end_ids)
    for i in range(min(max_new_tokens, room)):
        with torch.no_grad(), answering() if i else nullcontext():
            batch = torch.tensor([ids], device=lm.device)
            mask = torch.ones(1, total, dtype=torch.bool, device=lm.device)
            logprobs = log_softmax(forward(lm.model, batch, mask, cache=cache, keep=1).logits[0, -1])
        chosen = _draw(logprobs, temperature, generator)
        if chosen in end_ids:
            return
        yield Next(chosen, logprobs)
        ids, total = [chosen], total + 1


def _draw(logprobs: Float[Tensor, " vocab"], temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logprobs.argmax())
    return int(torch.multinomial((logprobs / temperature).softmax(-1), 1, generator=generator))


class Spelling:
    """Tokens to text as they come: what half a character is holds back until the other half is there."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids, self._text = tokenizer, list[int](), ""

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._add(text)

    def rest(self) -> str:
        """What was held back to the end."""
        return self._add(self._decode())

    def _add(self, text: str) -> str:
        new, self._text = text[len(self._text) :], text
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
