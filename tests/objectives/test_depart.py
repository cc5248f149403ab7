from __future__ import annotations

import math

import pytest
import torch
from objectives.scenes import VOCAB, Scene, fixture_l, gradients

from concept_unlearn.objectives import Depart, Follow, RetainKL


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


def said(scene, z):
    return Scene(scene.batches, {s: t.requires_grad_() for s, t in z.items()}, scene.z0, scene.h, scene.h0)


def test_it_is_minus_the_divergence_from_the_reference(scene):
    torch.testing.assert_close(scene.loss(Depart(kappa=1e9)), -kl(scene))
    assert not torch.isclose(scene.loss(Depart(kappa=1e9)), -scene.loss(RetainKL()))


def test_following_is_departing_backwards_and_without_a_bound(scene):
    torch.testing.assert_close(scene.loss(Follow()), kl(scene))
    torch.testing.assert_close(scene.loss(Follow()), -scene.loss(Depart(kappa=math.inf)))


def kl(scene):
    use = scene.batches["forget"].positions()
    p, p0 = (own["forget"].softmax(-1)[use] for own in (scene.z, scene.z0))
    return (p0 * (p0 / p).log()).sum(-1).mean()


def test_a_token_that_is_far_enough_has_no_gradient_and_counts_kappa(scene):
    use = scene.batches["forget"].positions()
    p, p0 = (own["forget"].softmax(-1)[use] for own in (scene.z, scene.z0))
    divergence = (p0 * (p0 / p).log()).sum(-1).detach()
    kappa = float(divergence.median()) + 1e-6
    assert 0 < (divergence > kappa).sum() < len(divergence)
    moved = gradients(scene.loss(Depart(kappa=kappa)), scene.leaves)["z", "forget"][use].abs().sum(-1) > 0
    assert torch.equal(moved, divergence <= kappa)
    assert scene.loss(Depart(kappa=kappa)).item() == pytest.approx(-divergence.clamp(max=kappa).mean().item())


def test_the_bound_is_what_guessing_is_from_certainty(scene):
    far = said(scene, {s: torch.randn_like(z) * 1e4 for s, z in scene.z.items()})
    assert far.loss(Depart()).item() >= -math.log(VOCAB) - 1e-9
    assert far.loss(Depart()).item() == pytest.approx(far.loss(Depart(kappa=math.log(VOCAB))).item())


def test_at_the_reference_it_is_zero_and_so_is_its_gradient(scene):
    start = said(scene, {s: z.detach().clone() for s, z in scene.z0.items()})
    loss = start.loss(Depart())
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradients(loss, start.leaves)["z", "forget"].abs().max() < 1e-12


def test_golden():
    """KL of softmax(1, 1, 0, 0) from softmax(2, 1, 0, -1), computed by hand."""
    assert fixture_l().loss(Depart()).item() == pytest.approx(-0.20272225185, abs=1e-9)
