"""Features fall silent: what is counted, what is left out, and where the gradient leads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_perfect_sae, make_sae
from objectives.scenes import NO_MODEL, SITE, D, Scene, assert_same, gradients, in_parts, widen

from concept_unlearn.errors import DictionaryMismatch
from concept_unlearn.objectives import LowerFeatures, Objective

CHOSEN = (0, 3, D + 1)
"""Of the perfect dictionary: x_0, x_3 and -x_1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dictionaries")
    hook = "blocks.2.hook_resid_post"
    make_perfect_sae(hook, D).save_model(root / "perfect")
    sinks = make_perfect_sae(hook, D)
    sinks.cfg.metadata.max_norm = 2.0
    sinks.save_model(root / "sinks")
    for kind, more in (("jumprelu", {}), ("gated", {}), ("topk", {"k": 4})):
        make_sae(kind, d_in=D, d_sae=12, hook_name=hook, **more).to(dtype=torch.float32).save_model(root / kind)
    return root


@pytest.fixture(params=["perfect", "sinks", "jumprelu", "gated", "topk"])
def objective(request, folder):
    return LowerFeatures(dictionary=str(folder / request.param), features=CHOSEN)


@pytest.fixture
def scene():
    return Scene.random()


def test_it_is_the_mean_over_tokens_but_the_first_of_what_the_features_say(folder, scene):
    batch, h = scene.batches["forget"], scene.h["forget"].detach()
    want, n = 0.0, 0
    for row, mask in zip(h, batch.mask, strict=True):
        for x in row[mask][1:]:
            want += float(x[0].relu() + x[3].relu() + (-x[1]).relu())
            n += 1
    loss = scene.loss(LowerFeatures(dictionary=str(folder / "perfect"), features=CHOSEN))
    assert float(loss.detach()) == pytest.approx(want / n)


def test_sinks_add_nothing_but_are_tokens(folder, scene):
    sparing, plain = (LowerFeatures(dictionary=str(folder / name), features=CHOSEN) for name in ("sinks", "perfect"))
    small = scene.map(lambda x: torch.where(x.norm(dim=-1, keepdim=True) <= 2, x, 0.0))
    assert 0 < scene.loss(sparing) < scene.loss(plain)
    torch.testing.assert_close(scene.loss(sparing), small.loss(plain))


def test_the_gradient_is_the_encoders_where_the_feature_fires_and_nothing_elsewhere(folder, scene):
    objective = LowerFeatures(dictionary=str(folder / "perfect"), features=(0,))
    found = gradients(scene.loss(objective), scene.leaves)["h", "forget"]
    batch, h = scene.batches["forget"], scene.h["forget"]
    first = batch.mask & (batch.mask.cumsum(-1) == 1)
    fires = batch.mask & ~first & (h[..., 0] > 0)
    assert torch.equal(found[..., 0] != 0, fires)
    assert not found[..., 1:].any()
    assert len(found[..., 0][fires].unique()) == 1


def test_where_features_compete_the_losers_have_no_gradient_and_the_winners_have(folder, scene):
    objective = LowerFeatures(dictionary=str(folder / "topk"), features=CHOSEN)
    acts = objective._slice.encode(scene.h["forget"].detach()).acts
    batch = scene.batches["forget"]
    counted = batch.mask & (batch.mask.cumsum(-1) > 1)
    moved = gradients(scene.loss(objective), scene.leaves)["h", "forget"].abs().sum(-1) > 0
    assert torch.equal(moved, counted & (acts > 0).any(-1))
    assert 0 < moved.sum() < counted.sum()
    assert float(scene.loss(objective).detach()) == pytest.approx(float(acts.sum(-1)[counted].sum() / counted.sum()))


def test_padding_and_order_change_nothing(objective, scene):
    padded = scene.map(
        lambda x: F.pad(x, (0, 0, 2, 1), value=math.nan), {s: widen(b, 2, 1) for s, b in scene.batches.items()}
    )
    turned = scene.rows([5, 2, 7, 0, 1, 6, 3, 4])
    for other in (padded, turned):
        torch.testing.assert_close(other.loss(objective), scene.loss(objective), rtol=1e-6, atol=1e-7)
        assert_same(
            gradients(other.loss(objective), scene.leaves), gradients(scene.loss(objective), scene.leaves),
            rtol=1e-5, atol=1e-7,
        )  # fmt: skip


def test_the_parts_of_a_step_add_up_to_the_step(objective, scene):
    parts = [scene.rows(rows) for rows in ((3,), (0, 1, 2, 4, 5, 6, 7))]
    losses = in_parts(
        objective,
        [lambda whole, tally, part=part: part.loss(objective, whole=whole, tally=tally) for part in parts],
        [part.batches for part in parts],
    )
    torch.testing.assert_close(torch.stack(losses).sum(), scene.loss(objective), rtol=1e-6, atol=1e-7)


def test_it_reads_the_forget_text_where_its_dictionary_does(objective):
    (read,) = objective.reads(NO_MODEL)
    assert (read.split, read.what, read.where, read.reference) == ("forget", SITE, "real", False)


def test_it_is_its_spec(objective):
    assert Objective.parse(objective.spec()) == objective


def test_an_activation_of_another_width_is_refused(tmp_path, scene):
    make_perfect_sae("blocks.2.hook_resid_post", D + 1).save_model(tmp_path / "wide")
    objective = LowerFeatures(dictionary=str(tmp_path / "wide"), features=(0,))
    with pytest.raises(DictionaryMismatch, match=f"{D + 1} numbers a token"):
        scene.loss(objective)
