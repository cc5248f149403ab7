"""Passages about the same are put together, the same way each time."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import words

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.features.clusters import clusters, embeddings

POOLS = (range(8, 12), range(20, 24), range(32, 36))


@pytest.fixture
def passages():
    """Of three topics in turn, half of them replies."""
    rng = random.Random(1)

    def passage(i):
        pool = POOLS[i % 3]
        return Passage(text=words(*rng.choices(pool, k=20)), prompt=words(*pool[:2]) if i % 2 else None)

    return [passage(i) for i in range(18)]


def test_planted_topics_are_found(lm, passages):
    assert clusters(lm, passages, 3) == [0, 1, 2] * 6


def test_the_same_seed_gives_the_same_clusters_and_leaves_the_random_state(lm, passages):
    before = torch.random.get_rng_state()
    assert clusters(lm, passages, 5, seed=3) == clusters(lm, passages, 5, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_numbers_are_in_order_of_appearance_and_none_is_empty(lm, passages):
    found = clusters(lm, passages, 4)
    assert sorted(set(found)) == list(range(4))
    assert list(dict.fromkeys(found)) == list(range(4))


def test_an_embedding_is_of_length_one_and_of_its_passage_alone(lm, passages):
    found = embeddings(lm, passages)
    assert found.norm(dim=-1).allclose(torch.ones(len(passages), dtype=found.dtype))
    turned = embeddings(lm, passages[::-1])
    torch.testing.assert_close(turned.flip(0), found, rtol=0, atol=1e-5)


def test_more_clusters_than_passages_are_refused(lm, passages):
    with pytest.raises(InvalidConfig, match="18 passages make no 19 clusters"):
        clusters(lm, passages, 19)
