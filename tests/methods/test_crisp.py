"""CRISP chooses the planted features and trains the blocks below them until they hardly fire, for good."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import PLANTED, make_hf, make_hooked, make_tokenizer

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.lm import LM
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.methods import CRISP, Method, Study
from concept_unlearn.patches import WeightPatch, load_patch
from concept_unlearn.weights import LowRank


def crisp(planted, **changes):
    settings = {
        "dictionaries": (planted.second,), "score": "mean_difference", "n": 2, "beta": 1.0, "gamma": 0.1, "lr": 1e-2,
        "max_steps": 30, "batch_size": 8, "warm_up": 0.0,
    }  # fmt: skip
    return CRISP(**settings | changes)


@torch.no_grad()
def firing(lm: LM, passages: tuple[Passage, ...], objective, patch=None) -> float:
    """What the chosen features say of each token, in the mean."""
    chosen, found = objective._slice, []
    with nullcontext() if patch is None else patch.on(lm):
        for passage in passages:
            with lm.read(chosen.site) as seen:
                lm.logits(torch.tensor([lm.encode(passage.text, chat=False)]))
            found.append(chosen.encode(seen[chosen.site][0]).acts[1:].sum(-1))
    return float(torch.cat(found).mean())


@pytest.fixture(scope="module")
def fitted(planted):
    study = Study(planted.lm, planted.scope)
    before = checksum(planted.lm.model)
    method, losses = crisp(planted), []
    patch = method.fit(study, log=lambda _, values: losses.append(values))
    assert checksum(planted.lm.model) == before
    return method.recipe(study), patch, losses


def test_the_chosen_features_fall_on_the_concept_and_far_less_elsewhere(planted, fitted):
    recipe, patch, losses = fitted
    quiet = recipe.objectives[0]
    forget, kept = planted.scope.forget, planted.scope.retain
    before, after = firing(planted.lm, forget, quiet), firing(planted.lm, forget, quiet, patch)
    assert after < 0.4 * before
    assert losses[0]["lower_features"] == pytest.approx(before, rel=0.3)
    assert losses[-1]["lower_features"] < 0.5 * losses[0]["lower_features"]
    lost = firing(planted.lm, kept, quiet) - firing(planted.lm, kept, quiet, patch)
    assert abs(lost) < 0.5 * (before - after)


def test_what_is_left_is_of_low_rank_and_in_the_blocks_up_to_the_dictionary(fitted):
    _, patch, _ = fitted
    assert isinstance(patch, WeightPatch)
    assert {type(d) for d in patch.deltas.values()} == {LowRank}
    assert {name.split(".")[2] for name in patch.deltas} == {"0", "1"}
    assert {name.split(".")[-2] for name in patch.deltas} >= {"q_proj", "down_proj"}


def test_it_is_a_patch_like_any_other(planted, fitted, ids, tmp_path):
    _, patch, _ = fitted
    with torch.no_grad():
        base = planted.lm.logits(ids)
        with patch.at(0).on(planted.lm):
            assert torch.equal(planted.lm.logits(ids), base)
        with patch.on(planted.lm):
            want = planted.lm.logits(ids)
        assert not torch.allclose(want, base)
        patch.save(tmp_path / "patch", planted.lm)
        with load_patch(tmp_path / "patch", planted.lm).on(planted.lm):
            assert torch.equal(planted.lm.logits(ids), want)
        assert torch.equal(planted.lm.logits(ids), base)


def test_the_recipe_says_what_was_chosen_and_how_much_each_term_weighs(planted):
    method = crisp(planted, dictionaries=(planted.first, planted.second), alpha=2.0, beta=6.0, gamma=0.5)
    lower, other, first, second, coherent = method.recipe(Study(planted.lm, planted.scope)).objectives
    assert set(lower.features) == set(PLANTED)
    assert [o.weight for o in (lower, other)] == [1.0, 1.0]
    assert [(str(o.site), o.weight) for o in (first, second)] == [
        ("blocks.0.hook_resid_pre", 3.0), ("blocks.1.hook_resid_post", 3.0)
    ]  # fmt: skip
    assert (coherent.kind, coherent.weight) == ("retain_kl", 0.5)
    (_,) = crisp(planted, beta=0, gamma=0).recipe(Study(planted.lm, planted.scope)).objectives


def test_it_trains_the_weights_of_these_blocks_where_there_is_no_adapter(planted):
    patch = crisp(planted, adapter=None, max_steps=2)(planted.lm, planted.scope)
    assert {name.split(".")[2] for name in patch.deltas} == {"0", "1"}


def test_target_modules_that_are_given_are_kept(planted):
    patch = crisp(planted, adapter={"r": 2, "target_modules": ["down_proj"]}, max_steps=2)(planted.lm, planted.scope)
    assert all(name.endswith("down_proj.weight") for name in patch.deltas)


def test_features_that_nothing_trained_feeds_are_refused(planted):
    with pytest.raises(InvalidConfig, match="no block comes before"):
        crisp(planted, dictionaries=(planted.first,))(planted.lm, planted.scope)


def test_stopped_it_goes_on_to_the_same_bytes(planted, tmp_path):
    settings = {"max_steps": 6, "checkpoint_every": 2}
    whole = crisp(planted, **settings)(planted.lm, planted.scope, folder=tmp_path / "whole")

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        crisp(planted, **settings).fit(Study(planted.lm, planted.scope, folder=folder), probe=stop)
    again = crisp(planted, **settings)(planted.lm, planted.scope, folder=folder)
    assert again.digest == whole.digest


def test_a_gpt2_is_trained_too_and_of_transformer_lens_the_weights(planted, tmp_path):
    gpt2 = LM(make_hf("gpt2"), make_tokenizer(), name="gpt2")
    assert crisp(planted, max_steps=2, adapter={"r": 2, "fan_in_fan_out": True})(gpt2, planted.scope).deltas
    hooked = LM(make_hooked(tmp_path))
    with pytest.raises(InvalidConfig, match=r"no linear layers .* set adapter to null"):
        crisp(planted, max_steps=2)(hooked, planted.scope)
    names = crisp(planted, max_steps=2, adapter=None)(hooked, planted.scope).deltas
    assert {name.split(".")[1] for name in names} == {"0", "1"}


def test_it_is_its_spec(planted):
    assert Method.parse(crisp(planted).spec()) == crisp(planted)
