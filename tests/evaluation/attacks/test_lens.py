"""The logit lens: an inner layer's residual stream through the model's own last norm and head."""

from __future__ import annotations

import pytest
import torch
from conftest import N_LAYERS, n_hooks
from evaluation.attacks.scenes import assert_same, patch_of, state, victim_of

from concept_unlearn.errors import InvalidConfig, SiteNotFound
from concept_unlearn.evaluation.attacks import LogitLens
from concept_unlearn.evaluation.attacks.lens import LensPatch, layers
from concept_unlearn.patches import Patch, Stack, WeightPatch
from concept_unlearn.weights import Dense

LAST = N_LAYERS - 1
LOGPROB = "forget/answer_logprob"


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_head_reads_what_that_layer_left(layer, lm, ids):
    with torch.no_grad():
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
        inner = lm.model.model.norm(hidden[layer + 1]) if layer != LAST else hidden[-1]  # the last comes normed
        want = lm.model.lm_head(inner)
        with LensPatch(layer).on(lm):
            assert torch.allclose(lm.logits(ids), want, atol=1e-5)


def test_at_the_last_layer_it_is_the_model_itself(any_lm, ids):
    plain, before = any_lm.logits(ids), n_hooks(any_lm.model)
    with LensPatch(any_lm.n_layers - 1).on(any_lm):
        assert torch.equal(any_lm.logits(ids), plain)
    with LensPatch(0).on(any_lm):
        assert not torch.equal(any_lm.logits(ids), plain)
    assert torch.equal(any_lm.logits(ids), plain)
    assert n_hooks(any_lm.model) == before


def test_it_writes_what_it_scores_with_and_without_a_cache(any_lm):
    prompts = [[8, 9, 10], [11, 12, 13, 14]]
    with LensPatch(1).on(any_lm):
        rows = any_lm.generate_ids(prompts, max_new_tokens=5)
        assert any_lm.generate_ids(prompts, max_new_tokens=5, use_cache=False) == rows
        scored = any_lm.score(prompts, [[row] for row in rows])
    assert all(s.greedy.all() for (s,) in scored)


def test_strength_and_switch(lm, ids):
    plain = lm.logits(ids)
    with LensPatch(0).on(lm) as switch:
        switch.enabled = False
        assert torch.equal(lm.logits(ids), plain)
        switch.enabled = True
        assert not torch.equal(lm.logits(ids), plain)
    with LensPatch(0, strength=0.0).on(lm):
        assert torch.equal(lm.logits(ids), plain)


def test_an_edit_below_the_layer_is_seen_and_one_above_is_not(lm, ids):
    patch = patch_of("feature", lm)  # before block 0
    with LensPatch(0).on(lm):
        untouched = lm.logits(ids)
    with Stack((patch, LensPatch(0))).on(lm):
        assert not torch.equal(lm.logits(ids), untouched)
    above = WeightPatch({"model.layers.1.mlp.up_proj.weight": Dense(torch.ones(32, 16))})
    with Stack((above, LensPatch(0))).on(lm):
        assert torch.equal(lm.logits(ids), untouched)
    with Stack((above, LensPatch(1))).on(lm):
        seen = lm.logits(ids)
    with LensPatch(1).on(lm):
        assert not torch.equal(lm.logits(ids), seen)


def test_the_layer_that_leaks_most_is_reported_and_the_curve_holds_all(lm):
    victim = victim_of(lm, patch_of("weight", lm))
    found = LogitLens(stride=1)(victim)
    assert [n for n, _ in found.curve] == list(range(N_LAYERS))
    plain = victim.benchmark.measure(victim.benchmark.observe(lm, victim.patch, metrics=victim.leaks))
    assert found.curve[-1][1] == plain[LOGPROB].value
    best = max(found.curve, key=lambda point: point[1])
    assert (found.results[LOGPROB].notes["layer"], found.results[LOGPROB].value) == best
    assert len({value for _, value in found.curve}) == N_LAYERS


def test_strides_count_from_the_last_layer(lm):
    assert layers(lm, 1) == [0, 1, 2]
    assert layers(lm, 2) == [0, 2]
    assert layers(lm, 99) == [2]


def test_what_is_not_there_is_refused(lm, monkeypatch):
    before = state(lm)
    with pytest.raises(SiteNotFound), LensPatch(7).on(lm):
        pass
    assert_same(before, state(lm))
    monkeypatch.setattr(type(lm), "n_layers", 1)
    with pytest.raises(InvalidConfig, match="single layer"):
        LogitLens()(victim_of(lm))


def test_it_comes_back_from_its_spec():
    assert Patch.kinds["lens"].restore(LensPatch(3).spec(), {}, None) == LensPatch(3)
