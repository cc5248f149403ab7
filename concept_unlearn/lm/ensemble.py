"""Three models that speak as one, l_e = l_M + alpha (l_o' - l_o): a big one, and a small one before and after training.

The small model reads what the big one reads, token for token. It has a key-value cache of its own for each of its two
states, which grow, and are reordered, selected and cropped, as the big model's cache is.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PatchMismatch, PatchNotReached
from .context import Context
from .forward import forward, new_cache
from .locate import is_hooked, text_config
from .model import LM

_IDS, _REAL = "ids", "real"


def offset(
    big: Float[Tensor, "*batch vocab"],
    trained: Float[Tensor, "*batch small"],
    base: Float[Tensor, "*batch small"],
    *,
    alpha: float,
    n: int,
) -> Float[Tensor, "*batch vocab"]:
    """l_M + alpha (l_o' - l_o) over the first ``n`` tokens; what the big model says of others stays.

    Computed in float32 (float64 if any is) and rounded once, to the dtype of ``big``.
    """
    wide = torch.float64 if torch.float64 in (big.dtype, trained.dtype, base.dtype) else torch.float32
    change = alpha * (trained[..., :n].to(wide) - base[..., :n].to(wide))
    said = (big[..., :n].to(wide) + change.to(big.device)).to(big.dtype)
    return said if n == big.shape[-1] else torch.cat([said, big[..., n:]], -1)


def common_vocabulary(big: LM, small: LM) -> int:
    """How many logits the two share: all where they have equally many, else those of the tokens there really are.

    Raises PatchMismatch where an id is not the same token to both.
    """
    mine, theirs = big.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    if mine != theirs:
        odd = min(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        raise PatchMismatch(
            f"{small.name} has another tokenizer than {big.name}: {odd!r} is token {theirs.get(odd)} to it, and "
            f"{mine.get(odd)} to {big.name}; an offset adds logits, so both need the same ids"
        )
    sizes, real = (_n_logits(big), _n_logits(small)), max(map(int, mine.values())) + 1
    if sizes[0] == sizes[1]:
        return sizes[0]
    if real > min(sizes):
        raise PatchMismatch(
            f"{big.name} has {sizes[0]} logits and {small.name} {sizes[1]}, but their tokenizer has {real} tokens"
        )
    return real


class Beside:
    """A small model that reads along with a big one."""

    def __init__(self, small: LM) -> None:
        self._small = small

    def hear(self, context: Context) -> None:
        """Of every pass, whether the small model will be asked or not. Raises PatchNotReached for an unknown past."""
        memory = context.memory
        if context.ids is None:
            raise PatchNotReached("the small model reads tokens, and this pass was given embeddings")
        if memory.start:
            raise PatchNotReached(
                f"switched on in mid-sequence: the small model has not read the {memory.start} tokens in the cache"
            )
        memory.extend(_IDS, context.ids.to(self._small.device))
        memory.extend(_REAL, context.real.to(self._small.device))

    def logits(self, state: str, context: Context, kept: int | Tensor) -> Float[Tensor, "batch kept small"]:
        """Of the pass just heard, as the model is now; each state has a cache, of the tokens it has read."""
        memory, model = context.memory, self._small.model
        ids, real = memory.histories[_IDS], memory.histories[_REAL]
        if state not in memory.caches:
            memory.caches[state] = new_cache(model, len(ids))
        cache = memory.caches[state]
        unread = ids[:, cache.get_seq_length() :].long()  # more than this pass where it was switched off for a while
        keep = kept if isinstance(kept, int) else context.real.shape[1]
        said = forward(model, unread, real.bool(), cache=cache, keep=keep).logits
        return said if isinstance(kept, int) else said[:, kept.to(said.device)]


def _n_logits(lm: LM) -> int:
    config: Any = lm.model.cfg if is_hooked(lm.model) else text_config(lm.model)
    return int(config.d_vocab if is_hooked(lm.model) else config.vocab_size)
