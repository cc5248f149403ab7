"""Masks: the largest scores of all parameters together, exactly, whatever the score."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from concept_unlearn.errors import InvalidConfig, NonFinite
from concept_unlearn.weights import (
    GradientWeightScore,
    MagnitudeWeightScore,
    RandomWeightScore,
    SnipWeightScore,
    WagleWeightScore,
    WeightScore,
    restore_delta,
    shares,
)
from concept_unlearn.weights.masks import largest, median, under
from concept_unlearn.weights.scores import Evidence

SHAPES = {"model.embed.weight": (7, 4), "model.layers.0.w": (5, 3), "model.layers.1.w": (11,), "model.norm.weight": ()}


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def scored(score: WeightScore, known: Evidence) -> dict[str, torch.Tensor]:
    return {name: score(known, name) for name in known.weights}


@pytest.fixture
def known():
    return Evidence(draw(0), forget=draw(1), retain=draw(2))


class TestLargest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["any", "few values", "tiny"])
    def test_it_is_what_sorting_all_of_them_gives(self, dtype, kind):
        for seed in range(5):
            scores = {name: t.abs() for name, t in draw(seed, dtype).items()}
            if kind == "few values":
                scores = {name: t.round() for name, t in scores.items()}
            if kind == "tiny":  # below the smallest normal number
                scores = {name: t * torch.finfo(dtype).tiny / 100 for name, t in scores.items()}
            ranks = flat(scores).argsort(descending=True, stable=True).argsort()
            for n in (1, 2, 17, 54, 55):
                assert torch.equal(flat(largest(scores, n)), ranks < n)

    def test_equal_scores_go_in_the_order_of_parameters_and_entries(self):
        masks = largest({"b": torch.ones(2, 2), "a": torch.ones(3)}, 5)
        assert masks["b"].all()
        assert masks["a"].tolist() == [True, False, False]

    def test_a_layer_that_has_all_the_large_ones_is_taken_whole(self):
        scores = {name: t.abs() for name, t in draw(0).items()}
        scores["model.layers.0.w"] += 100
        assert shares(largest(scores, 15)) == {"model.embed": 0.0, "0": 1.0, "1": 0.0, "model.norm": 0.0}

    def test_a_smaller_share_is_part_of_a_larger_one(self):
        scores = {name: t.round().abs() for name, t in draw(3).items()}
        masks = [flat(largest(scores, n)) for n in range(1, 56)]
        assert [int(m.sum()) for m in masks] == list(range(1, 56))
        assert not any((small & ~large).any() for small, large in pairwise(masks))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_score_that_is_no_number_is_named(self, bad):
        with pytest.raises(NonFinite, match=r"score of b is NaN or infinite"):
            largest({"a": torch.ones(2), "b": torch.tensor([1.0, bad])}, 1)


class TestMedian:
    def test_it_is_that_of_all_magnitudes_but_zeros(self):
        for seed in range(4):
            values = draw(seed)
            values["model.embed.weight"][:3] = 0
            magnitudes = flat(values).abs()
            assert median(values) == float(magnitudes[magnitudes > 0].median())

    def test_of_nothing_it_is_zero(self):
        assert median({"a": torch.zeros(3)}) == 0


class TestScores:
    def test_wagle_by_hand(self):
        known = Evidence(
            {"w": torch.tensor([2.0, -1.0])},
            forget={"w": torch.tensor([1.0, 3.0])},
            retain={"w": torch.tensor([1.0, -2.0])},
        )
        score = WagleWeightScore(gamma_h=0.5)
        assert score(known, "w").tolist() == [0.0, 9.0]  # |(2 - 1/.5) 1|, |(-1 + 2/.5) 3|
        assert largest(scored(score, known), 1)["w"].tolist() == [False, True]

    def test_gamma_makes_both_terms_weigh_alike_by_default(self, known):
        gamma = float(flat(known.retain).abs().median() / flat(known.weights).abs().median())
        for name, found in scored(WagleWeightScore(), known).items():
            assert torch.equal(found, WagleWeightScore(gamma_h=gamma)(known, name))

    def test_without_a_retained_gradient_gamma_has_to_be_given(self, known):
        silent = Evidence(known.weights, forget=known.forget, retain={n: t * 0 for n, t in known.retain.items()})
        with pytest.raises(InvalidConfig, match="gamma_h: the retained text has no gradient"):
            WagleWeightScore()(silent, "model.layers.0.w")

    @pytest.mark.parametrize("gamma", [1e12, 1e-12])
    def test_wagle_ranks_as_snip_does_or_by_both_gradients_in_the_limits(self, known, gamma):
        product = {name: (known.retain[name] * g).abs() for name, g in known.forget.items()}
        limit = scored(SnipWeightScore(), known) if gamma > 1 else product
        found = scored(WagleWeightScore(gamma_h=gamma), known)
        assert torch.equal(flat(found).argsort(), flat(limit).argsort())

    @pytest.mark.parametrize("score", [WagleWeightScore(), SnipWeightScore(), GradientWeightScore()])
    def test_the_sign_of_the_forget_gradient_does_not_matter(self, known, score):
        turned = Evidence(known.weights, forget={n: -t for n, t in known.forget.items()}, retain=known.retain)
        assert torch.equal(flat(scored(score, known)), flat(scored(score, turned)))

    def test_magnitude_asks_for_no_gradient(self, known):
        found = scored(MagnitudeWeightScore(), Evidence(known.weights))
        assert torch.equal(flat(found), flat(known.weights).abs())

    def test_random_is_of_the_seed_and_the_name_alone(self, known):
        one, again, other = (scored(RandomWeightScore(seed=s), known) for s in (0, 0, 1))
        assert torch.equal(flat(one), flat(again))
        assert not torch.equal(flat(one), flat(other))
        turned = Evidence(dict(reversed(known.weights.items())))
        assert all(torch.equal(RandomWeightScore()(turned, name), one[name]) for name in one)


class TestUnder:
    @pytest.mark.parametrize(("n", "kind"), [(0, "sparse"), (100, "sparse"), (149, "sparse"), (150, "dense")])
    def test_the_form_is_that_which_takes_less_room(self, n, kind):
        change, mask = torch.randn(8, 20), torch.zeros(160, dtype=torch.bool)
        mask[torch.randperm(160)[:n]] = True
        mask = mask.view(8, 20)
        delta = under(mask, change)
        assert delta.kind == kind
        assert torch.equal(delta.dense(), torch.where(mask, change, 0.0))
        room = sum(t.nbytes for t in delta.tensors().values())
        assert room <= change.nbytes
        assert torch.equal(restore_delta(delta.spec(), delta.tensors()).dense(), delta.dense())


def test_shares_are_by_block_and_by_what_is_outside_the_blocks():
    masks = {
        "transformer.wte.weight": torch.tensor([True, False]), "transformer.h.0.a.weight": torch.tensor([True]),
        "transformer.h.0.b.bias": torch.zeros(3, dtype=torch.bool), "transformer.h.10.a.weight": torch.tensor([True]),
        "model.layers.2.experts.7.w": torch.tensor([True, True]),
    }  # fmt: skip
    assert shares(masks) == {"transformer.wte": 0.5, "0": 0.25, "10": 1.0, "2": 1.0}
