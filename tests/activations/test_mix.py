"""Batches hold every row once an epoch, in an order that a position alone takes up again."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from conftest import D_MODEL

from concept_unlearn.activations.mix import Position, mixed
from concept_unlearn.errors import EmptyData
from concept_unlearn.lm import Site

A, B = Site("resid_post", 0), Site("resid_post", 1)


class Counting:
    """Shards of rows that carry their number: at the second site its negative."""

    sites, shard_tokens, model_name, model_fingerprint, key = (A, B), 10, "none", "none", "none"

    def __init__(self, n_shards=8, rows=10):
        self.n_shards, self.rows = n_shards, rows

    def shards(self, epoch, start, step):
        for i in range(start, self.n_shards, step):
            x = torch.arange(i * self.rows, (i + 1) * self.rows).float()[:, None].expand(-1, D_MODEL)
            yield {A: x + 1, B: -x - 1}


def numbers(batches):
    return [b.rows[A][:, 0].int().tolist() for b in batches]


def test_an_epoch_holds_every_row_once():
    found = numbers(islice(mixed(Counting(), batch=4, block_tokens=40), 20))
    assert sorted(n for batch in found for n in batch) == list(range(1, 81))
    assert found[0] != sorted(found[0])


def test_all_sites_have_the_same_rows_in_a_batch():
    for batch in islice(mixed(Counting(), batch=4, block_tokens=40), 20):
        assert torch.equal(batch.rows[A], -batch.rows[B])


@pytest.mark.parametrize("stop", [1, 7, 10, 11, 20, 27, 45])
def test_a_position_is_all_it_takes_to_go_on(stop):
    whole = list(islice(mixed(Counting(), batch=4, block_tokens=40, seed=3), 60))
    rest = mixed(Counting(), batch=4, block_tokens=40, seed=3, start=whole[stop - 1].next)
    assert numbers(islice(rest, 60 - stop)) == numbers(whole[stop:])


def test_the_seed_and_the_epoch_draw_another_order():
    a, b = (numbers(islice(mixed(Counting(), batch=40, block_tokens=80, seed=s), 4)) for s in (0, 1))
    assert a != b
    assert a[:2] != a[2:]
    assert sorted(a[0] + a[1]) == sorted(a[2] + a[3])


def test_sinks_at_any_site_are_left_out():
    limits = {A: 60.0 * D_MODEL**0.5, B: 50.0 * D_MODEL**0.5}
    found = numbers(islice(mixed(Counting(), batch=5, block_tokens=80, max_norm=limits), 10))
    assert sorted(n for batch in found for n in batch) == list(range(1, 51))


def test_too_few_rows_for_a_batch_are_an_error_and_no_endless_loop():
    with pytest.raises(EmptyData, match="fewer than 100 rows"):
        next(mixed(Counting(), batch=100, block_tokens=10))
    with pytest.raises(EmptyData, match="harvest"):
        next(mixed(Counting(n_shards=0), batch=4))


def test_a_short_block_at_the_end_is_skipped():
    source = Counting(n_shards=5)
    found = list(islice(mixed(source, batch=16, block_tokens=40), 4))
    assert [b.next for b in found] == [Position(0, 0, 1), Position(0, 0, 2), Position(1, 0, 1), Position(1, 0, 2)]


@pytest.mark.parametrize("n", [1, 3, 10, 11, 25, 47])
def test_no_more_shards_are_read_than_the_batches_need(n):
    source, read = Counting(), []
    whole = source.shards
    source.shards = lambda *a: (read.append(1) or shard for shard in whole(*a))
    found = list(mixed(source, batch=4, n=n, block_tokens=40))
    assert len(found) == n
    assert len(read) == -(-n * 4 // 10)


@pytest.mark.parametrize("stop", [1, 7, 10, 11, 23])
def test_a_stream_of_so_many_batches_goes_on_too(stop):
    whole = list(mixed(Counting(), batch=4, n=27, block_tokens=40))
    rest = mixed(Counting(), batch=4, n=27 - stop, block_tokens=40, start=whole[stop - 1].next)
    assert numbers(rest) == numbers(whole[stop:])


@pytest.mark.parametrize("batch", [10, 19, 20, 25])
def test_a_batch_as_large_as_a_shard_is_filled_from_the_next_one_where_sinks_were_left_out(batch):
    """Rows 1 and 2 are sinks, so the first shard alone falls short; the last batches take single shards."""

    class Sinking(Counting):
        def shards(self, epoch, start, step):
            for shard in super().shards(epoch, start, step):
                first = shard[A][:, 0] % 10 <= 2
                yield {site: torch.where(first[:, None], 1e6, x) for site, x in shard.items()}

    limits = {A: 1e5, B: 1e5}
    whole = list(mixed(Sinking(), batch=batch, n=9, max_norm=limits, block_tokens=10))
    assert len(whole) == 9
    assert all(b.rows[A].max() < 1e5 for b in whole)
    rest = mixed(Sinking(), batch=batch, n=5, max_norm=limits, block_tokens=10, start=whole[3].next)
    assert numbers(rest) == numbers(whole[4:])
