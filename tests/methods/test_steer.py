"""A direction without a dictionary, at one site or several: what it erases is gone where it was erased."""

from __future__ import annotations

import pytest
import torch

from concept_unlearn.edits import Shift
from concept_unlearn.errors import SiteNotFound
from concept_unlearn.lm import Site
from concept_unlearn.methods import Steer, Study

DIRECTIONS = ["difference_of_means", "leace"]


@pytest.mark.parametrize(
    "sites", [("resid_pre.0",), ("resid_post.1", "resid_post.0"), ("mlp_out.1", "hook_z.1")], ids=" ".join
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ablating_leaves_nothing_along_the_direction_at_any_site(planted, sites, direction):
    lm = planted.lm
    patch = Steer(sites=sites, direction=direction)(lm, planted.scope)
    assert patch.sites == tuple(sorted(map(Site.parse, sites)))
    ids = torch.tensor([lm.encode(p.text, chat=False) for p in planted.scope.forget])
    with torch.no_grad(), lm.read(*patch.sites) as seen:
        lm.logits(ids)
        before = [s.encode(seen[s.site]).acts.abs().max() for s in patch.slices]
        with patch.on(lm), lm.read(*patch.sites) as edited:
            lm.logits(ids)
    for chosen, there in zip(patch.slices, before, strict=True):
        assert there > 0.5
        assert chosen.encode(edited[chosen.site]).acts.abs().max() < 1e-4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ablating_makes_the_means_of_forget_and_retain_equal(planted, direction):
    site = Site("resid_post", 1)
    patch = Steer(sites=(site,), direction=direction)(planted.lm, planted.scope)
    before = Study(planted.lm, planted.scope).moments(site)
    with patch.on(planted.lm):
        after = Study(planted.lm, planted.scope).moments(site)
    assert (before.forget.x_mean - before.retain.x_mean).norm() > 1
    torch.testing.assert_close(after.forget.x_mean, after.retain.x_mean, rtol=0, atol=1e-4)


def test_shifting_by_minus_one_moves_the_forget_mean_to_where_retain_was(planted):
    site = Site("resid_post", 1)
    patch = Steer(sites=(site,), edit=Shift(by=-1.0))(planted.lm, planted.scope)
    before = Study(planted.lm, planted.scope).moments(site)
    with patch.on(planted.lm):
        after = Study(planted.lm, planted.scope).moments(site)
    torch.testing.assert_close(after.forget.x_mean, before.retain.x_mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_direction_does_not_depend_on_the_sites_beside_it(planted, direction):
    one, other = Site("resid_post", 0), Site("resid_post", 1)
    both = Steer(sites=(other, one), direction=direction)(planted.lm, planted.scope)
    for site, chosen in zip((one, other), both.slices, strict=True):
        (alone,) = Steer(sites=(site,), direction=direction)(planted.lm, planted.scope).slices
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(chosen.tensors()[name], tensor)


def test_a_site_that_the_model_lacks_is_named(planted):
    with pytest.raises(SiteNotFound, match="layers 0 to 2"):
        Steer(sites=("resid_post.7",))(planted.lm, planted.scope)
