"""Encoded texts in, token rows out: one truncated pass per batch for all sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..data.encode import pad
from ..errors import EmptyData
from ..lm import LM, Site
from ..tracking import Progress


class Rows(NamedTuple):
    activations: dict[Site, Float[Tensor, "tokens d"]]
    sequence: Int[Tensor, " tokens"]
    """Which text each row belongs to; the rows of a text follow one another in order."""


def stream(
    lm: LM,
    sites: Sequence[Site],
    texts: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 2048,
    skip: Sequence[int] = (),
    progress: Progress | None = None,
) -> Iterator[Rows]:
    """Every token of every text but padding and BOS. The model runs no deeper than the deepest site.

    Texts of similar length share a batch, so batches come longest first. The tokens of ``skip`` are left out where a
    text begins with them: say ``lm.chat_head``, whose activations are the same each time. ``progress`` hears of texts.
    """
    if not texts:
        raise EmptyData("no text to read activations from")
    for batch in _batches([len(t) for t in texts], batch_tokens):
        ids, mask = pad([texts[i] for i in batch], side="right", device=lm.device)
        seen = lm.activations(ids, mask, *sites)
        content = mask.clone() if lm.bos_id is None else mask & (ids != lm.bos_id)
        if skip and ids.shape[1] >= len(skip):
            content[_begin_with(ids, skip), : len(skip)] = False
        owner = torch.tensor(batch, device=ids.device)[:, None].expand_as(ids)
        yield Rows({site: x[content] for site, x in seen.items()}, owner[content])
        if progress:
            progress(len(batch))


def n_rows(text: Sequence[int], bos_id: int | None, skip: Sequence[int] = ()) -> int:
    """How many rows ``stream`` gives of a text."""
    begins = skip and list(text[: len(skip)]) == list(skip)
    rest = list(text[len(skip) if begins else 0 :])
    return len(rest) - (0 if bos_id is None else rest.count(bos_id))


def _begin_with(ids: Int[Tensor, "batch seq"], head: Sequence[int]) -> Bool[Tensor, " batch"]:
    return (ids[:, : len(head)] == torch.tensor(head, device=ids.device)).all(1)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
