"""A client counts what it asks, gets what the model would say, and can differentiate nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, n_hooks

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.lm import Site
from concept_unlearn.lm.oracle import EMBEDDING, Oracle

PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17]]


def shifted(x, context):
    return x + 1.0


def test_it_answers_as_the_model_does_and_counts_every_prompt(any_lm):
    heard = []
    oracle = Oracle(any_lm, batch_size=3, progress=heard.append)
    found = oracle.probabilities(PROMPTS)
    for row, prompt in zip(found, PROMPTS, strict=True):
        want = any_lm.logits(torch.tensor([prompt]))[0, -1].detach().softmax(-1)
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-5)
    assert oracle.queries == sum(heard) == 4
    oracle.score(PROMPTS[:2], [[[7], [8, 9]], [[10]]])
    assert oracle.queries == sum(heard) == 7


def test_embeddings_may_be_edited_and_nothing_deeper(lm):
    oracle = Oracle(lm)
    base, edited = oracle.probabilities(PROMPTS), oracle.probabilities(PROMPTS, {EMBEDDING: shifted})
    assert not torch.allclose(base, edited)
    with pytest.raises(InvalidConfig, match=r"reaches the embeddings at blocks\.0\.hook_resid_pre alone"):
        oracle.probabilities(PROMPTS, {Site("resid_post", 0): shifted})
    assert oracle.queries == 8
    assert n_hooks(lm.model) == 0


def test_nothing_can_be_differentiated_however_hard_an_edit_tries(lm):
    vector = torch.zeros(D_MODEL, requires_grad=True)

    def insisting(x, context):
        assert not any(p.requires_grad for p in lm.model.parameters())
        with torch.enable_grad():
            return x + vector

    found = Oracle(lm).probabilities(PROMPTS, {EMBEDDING: insisting})
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.sum().backward()
    assert vector.grad is None
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())


def test_an_oracle_that_was_interrupted_leaves_the_model_as_it_was(lm):
    frozen = next(lm.model.parameters()).requires_grad_(False)

    def breaking(x, context):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Oracle(lm).probabilities(PROMPTS, {EMBEDDING: breaking})
    assert [p.requires_grad for p in lm.model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert n_hooks(lm.model) == 0
