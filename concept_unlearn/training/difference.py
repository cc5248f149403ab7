"""How far one patched model is from another, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from ..data.examples import Passage
from ..errors import EmptyData
from ..lm import LM
from ..lm.forward import forward
from ..patches import Patch
from ..step import Batch
from .rows import Encoder, plain


class Difference(NamedTuple):
    """Over the tokens of answers, and of all of a plain text but its first."""

    kl: float
    """Mean KL(p_a || p_b), in nats a token."""
    same: float
    """Share of tokens at which both would say the same."""
    n_tokens: int


@torch.no_grad()
def difference(
    lm: LM,
    a: Patch | None,
    b: Patch | None,
    passages: Sequence[Passage],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> Difference:
    """Between the model under ``a`` and under ``b``; None is the model as it is. Raises EmptyData for no passage."""
    if not passages:
        raise EmptyData("two models differ on passages, and none is given")
    encoder = Encoder(lm.tokenizer, min(max_length, lm.context))
    split = plain(encoder, passages)
    kl, same, n = 0.0, 0, 0
    for start in range(0, len(split.rows), batch_size):
        batch = split.batch(range(len(split.rows))[start : start + batch_size], lm.device)
        p, q = (_log_probabilities(lm, patch, batch) for patch in (a, b))
        kl += float(kl_div(q, p, reduction="sum", log_target=True))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        n += len(p)
    return Difference(kl / n, same / n, n)


def _log_probabilities(lm: LM, patch: Patch | None, batch: Batch) -> Float[Tensor, "n vocab"]:
    with patch.on(lm) if patch is not None else nullcontext():
        logits = forward(lm.model, batch.ids, batch.mask).logits
    found: Tensor = logits[batch.positions()]
    return (found if found.dtype == torch.float64 else found.float()).log_softmax(-1)
