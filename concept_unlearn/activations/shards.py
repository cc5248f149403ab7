"""A corpus cut into shards of about equal size; the rows of a shard depend on nothing but the shard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..component import Frozen
from ..data.corpus import Corpus, sequences
from ..errors import EmptyData
from ..lm import LM, Site
from ..tracking import Progress
from .stream import n_rows, stream

Shard = dict[Site, Float[Tensor, "rows d"]]


class Harvest(Frozen):
    """What to keep of the activations of a corpus."""

    sites: tuple[Site, ...] = Field(min_length=1)
    tokens: int | None = Field(None, gt=0)
    """Rows a site; of the whole corpus where it is not given, or where there are fewer."""
    context: int = Field(256, gt=1)
    """Longer documents become several sequences."""
    shard_tokens: int = Field(65_536, gt=0)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class Texts(NamedTuple):
    """The text of one shard."""

    number: int
    ids: list[list[int]]
    n_rows: int
    """The last shard may be cut in the middle of a text."""
    last: bool


def cut(lm: LM, corpus: Corpus, harvest: Harvest) -> Iterator[Texts]:
    """Raises EmptyData where the corpus has no token to read."""
    left = harvest.tokens if harvest.tokens is not None else float("inf")
    held: list[list[int]] = []
    rows = index = 0
    waiting: Texts | None = None
    for ids in sequences(corpus, lm.tokenizer, context=harvest.context):
        if not (n := n_rows(ids, lm.bos_id, lm.chat_head)):
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        held.append(ids)
        rows += n
        if rows >= min(harvest.shard_tokens, left):
            waiting = Texts(index, held, int(min(rows, left)), last=rows >= left)
            held, rows, index, left = [], 0, index + 1, left - waiting.n_rows
            if not left:
                break
    if held:
        waiting = Texts(index, held, rows, last=True)
    if waiting is None:
        raise EmptyData(f"corpus {corpus.name!r} has no token to read activations from")
    yield waiting._replace(last=True)


def read(
    lm: LM, texts: Texts, harvest: Harvest, *, batch_tokens: int = 4096, progress: Progress | None = None
) -> Shard:
    """The rows of a shard, in the order of its text. ``progress`` hears of rows."""
    dtype = getattr(torch, harvest.dtype)
    parts: list[Shard] = []
    owners: list[Tensor] = []
    for rows in stream(lm, harvest.sites, texts.ids, batch_tokens=batch_tokens, skip=lm.chat_head):
        parts.append({site: x.to(dtype) for site, x in rows.activations.items()})
        owners.append(rows.sequence)
        if progress:
            progress(len(rows.sequence))
    order = torch.cat(owners).argsort(stable=True)[: texts.n_rows]
    return {site: torch.cat([part[site] for part in parts])[order].cpu() for site in harvest.sites}


class Live:
    """Shards computed as they are asked for, and kept nowhere."""

    def __init__(self, lm: LM, corpus: Corpus, harvest: Harvest) -> None:
        self._lm, self._corpus, self._harvest = lm, corpus, harvest
        self.sites, self.shard_tokens = tuple(sorted(harvest.sites)), harvest.shard_tokens
        self.model_name, self.model_fingerprint = lm.name, lm.fingerprint
        self._last: tuple[int, Shard] | None = None

    @property
    def key(self) -> str:
        return f"{self.model_fingerprint} {self._corpus.fingerprint} {self._harvest.model_dump_json()}"

    def shards(self, epoch: int, start: int, step: int) -> Iterator[Shard]:
        """Every ``step``-th from ``start`` on, in the order of the corpus, the same each epoch."""
        for texts in islice(cut(self._lm, self._corpus, self._harvest), start, None, step):
            if self._last is None or self._last[0] != texts.number:
                self._last = None  # before the next one is made, so that there is never more than one
                self._last = texts.number, read(self._lm, texts, self._harvest)
            yield self._last[1]
