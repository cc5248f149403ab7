"""Rows of many texts in random order, so that a batch holds a little of everything."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EmptyData
from ..lm import Site
from .processes import Processes
from .shards import Shard

NO_LIMIT: Mapping[Site, float] = MappingProxyType({})


class RowSource(Protocol):
    """Shards of rows: a ``Store``, or ``Live`` from the model."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def shard_tokens(self) -> int: ...

    @property
    def model_name(self) -> str: ...

    @property
    def model_fingerprint(self) -> str: ...

    @property
    def key(self) -> str:
        """Changes with anything that can change a row."""

    def shards(self, epoch: int, start: int, step: int) -> Iterator[Shard]: ...


class Position(NamedTuple):
    """Where a stream of batches stands: a pass over the source, the shards of it that this process has read before the
    block it is in, a batch in the block.
    """

    epoch: int = 0
    shard: int = 0
    batch: int = 0


class Batch(NamedTuple):
    rows: dict[Site, Float[Tensor, "batch d"]]
    next: Position
    """Where the stream goes on after this batch."""


def mixed(
    source: RowSource,
    *,
    batch: int,
    n: int | None = None,
    max_norm: Mapping[Site, float] = NO_LIMIT,
    block_tokens: int = 262_144,
    seed: int = 0,
    start: Position = Position(),
) -> Iterator[Batch]:
    """``n`` batches, or batches without end: blocks of shards, each shuffled as a whole, at all sites by the same
    permutation. No more shards are read than the ``n`` need; a block that fills no batch takes in the next shard.

    A position, and how many batches are left, is all it takes to go on where a stream stopped; only the block it
    stopped in is read again. Rows that fill no batch at the end of a block are left out, and so are rows above
    ``max_norm`` at any site. Each of several processes reads shards of its own. Raises EmptyData where a pass fills no
    batch.
    """
    here, per_block = Processes.here(), max(1, block_tokens // source.shard_tokens)
    position, left = start, None if n is None else n + start.batch  # from the beginning of the block on
    while left is None or left > 0:
        filled = position != Position(position.epoch)
        shards = source.shards(position.epoch, here.rank + position.shard * here.world, here.world)
        while block := list(islice(shards, min(per_block, _shards_for(left, batch, source)))):
            rows = _joined(block, max_norm)
            while _n_rows(rows) < batch and (more := list(islice(shards, 1))):
                block += more
                rows = _joined(block, max_norm)
            generator = torch.Generator().manual_seed(_seed(seed + here.rank, position))
            order = torch.randperm(_n_rows(rows), generator=generator)
            n_batches = len(order) // batch if left is None else min(len(order) // batch, left)
            for i in range(position.batch, n_batches):
                filled = True
                chosen = order[i * batch : (i + 1) * batch]
                yield Batch({site: x[chosen] for site, x in rows.items()}, position._replace(batch=i + 1))
            left = None if left is None else left - n_batches
            position = Position(position.epoch, position.shard + len(block))
        if not filled:
            raise EmptyData(
                f"process {here.rank} of {here.world} finds fewer than {batch} rows to fill a batch in its whole "
                "share: harvest more text, or ask for smaller batches"
            )
        position = Position(position.epoch + 1)


def _shards_for(left: int | None, batch: int, source: RowSource) -> int:
    return sys.maxsize if left is None else -(-left * batch // source.shard_tokens)


def _n_rows(shard: Shard) -> int:
    return len(next(iter(shard.values())))


def _joined(block: list[Shard], max_norm: Mapping[Site, float]) -> Shard:
    joined = {site: torch.cat([shard[site] for shard in block]) for site in block[0]}
    keep = torch.ones(_n_rows(joined), dtype=torch.bool)
    for site, limit in max_norm.items():
        keep &= joined[site].float().norm(dim=-1) <= limit
    return joined if keep.all() else {site: x[keep] for site, x in joined.items()}


def _seed(seed: int, position: Position) -> int:
    digest = hashlib.sha256(f"{seed} {position.epoch} {position.shard}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
