"""Each published rule on a planted table, and the theorems behind the directions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2_contingency

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.features import (
    AttributionScore,
    AUCScore,
    CountScore,
    EnrichmentScore,
    FisherScore,
    MeanDifferenceScore,
    SelectivityScore,
    SparsityScore,
    difference_of_means,
    leace,
    matched_frequency,
    select,
)
from concept_unlearn.features.scores import _association_p
from concept_unlearn.features.stats import CorpusStats, Stats, _bin, _n_bins
from concept_unlearn.lm import Site


def corpus(acts, *, n_tokens_per_sequence=10, x=None):
    """Statistics of given activations, ``[tokens, n_features]``."""
    peaks = acts.view(-1, n_tokens_per_sequence, acts.shape[1]).amax(1)
    hist = torch.zeros(acts.shape[1], _n_bins(), dtype=torch.int32)
    bins = _bin(peaks)
    hist.scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.int32))
    x = acts if x is None else x
    return CorpusStats(
        n_tokens=len(acts), n_sequences=len(peaks), count=(acts > 0).sum(0), total=acts.sum(0),
        squares=acts.square().sum(0), largest=acts.amax(0), sequences=(peaks > 0).sum(0), peaks=hist, x_mean=x.mean(0),
        x_second=x.double().T @ x.double() / len(x), median_norm=1.0,
    )  # fmt: skip


def stats(forget, retain, **more):
    return Stats("planted", Site("resid_post", 1), corpus(forget), corpus(retain), **more)


def sparse(rates, n=1000, value=1.0, seed=0):
    """Feature i fires on exactly the share ``rates[i]`` of tokens."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.zeros(n, len(rates))
    for i, rate in enumerate(rates):
        acts[torch.randperm(n, generator=generator)[: round(rate * n)], i] = value
    return acts


def test_sparsity_ranks_by_forget_frequency_what_retain_spares():
    found = stats(sparse([0.5, 0.3, 0.4, 0.0]), sparse([0.02, 0.0, 0.009, 0.0]))
    assert select(found, SparsityScore(max_retain_rate=0.01), 2) == (2, 1)
    assert SparsityScore(max_retain_rate=0.01)(found)[0] == -math.inf


def test_fisher_ranks_by_squared_activation_among_high_ratios():
    forget, retain = sparse([0.5] * 20), sparse([0.5] * 20)
    forget[:, 3] *= 10
    forget[:, 4] *= 3
    assert select(stats(forget, retain), FisherScore(min_ratio_percentile=90), 2) == (3, 4)


def test_count_takes_frequent_features_with_a_large_mean_ratio():
    found = stats(sparse([0.5, 0.6, 0.2]), sparse([0.01, 0.5, 0.0]))
    assert select(found, CountScore(), 2) == (0, 2)
    assert CountScore()(found)[1] == -math.inf


def test_mean_difference_is_of_shares():
    found = MeanDifferenceScore()(stats(sparse([0.5, 0.5]), sparse([0.1, 0.3])))
    torch.testing.assert_close(found, torch.tensor([0.5 - 0.25, 0.5 - 0.75]))


def test_selectivity_weighs_frequency_by_log_ratio():
    found = SelectivityScore(smoothing=0.0)(stats(sparse([0.5, 0.4, 0.04]), sparse([0.2, 0.01, 0.001])))
    assert found[0] == -math.inf
    torch.testing.assert_close(found[1:], torch.tensor([0.4 * math.log(40), 0.04 * math.log(40)]))


def test_the_chi_squared_test_is_uncorrected():
    """Golden values of the specification: 30 of 100 against 10 of 200."""
    assert _association_p(30, 100, 10, 200) == pytest.approx(1.9156e-9, rel=1e-4)
    assert chi2_contingency([[30, 70], [10, 190]], correction=False).statistic == pytest.approx(36.0577, rel=1e-5)
    smoothed = (30.5 / 101) / (10.5 / 201)
    assert smoothed == pytest.approx(5.7808, rel=1e-4)


def test_enrichment_finds_the_planted_feature_and_nothing_in_identical_corpora():
    generator = torch.Generator().manual_seed(0)
    forget, retain = ((torch.rand(3000, 60, generator=generator) < 0.02).float() for _ in range(2))
    assert not EnrichmentScore()(stats(forget, forget)).isfinite().any()
    forget[:, 7] = sparse([0.1], 3000)[:, 0]
    retain[:, 7] = sparse([0.002], 3000)[:, 0]
    assert EnrichmentScore()(stats(forget, retain)).isfinite().nonzero().tolist() == [[7]]


def test_auc_is_the_rank_statistic_of_binned_peaks():
    generator = torch.Generator().manual_seed(0)
    forget = torch.rand(400, 3, generator=generator) * torch.tensor([4.0, 1.0, 0.5])
    retain = torch.rand(400, 3, generator=generator)
    found = AUCScore(min_auc=-1.0)(stats(forget, retain))
    for i in range(3):
        f, r = (_bin(a.view(-1, 10, 3).amax(1))[:, i] for a in (forget, retain))
        pairs = (f[:, None] > r[None]).float() + 0.5 * (f[:, None] == r[None]).float()
        assert float(found[i]) == pytest.approx(float(pairs.mean()), abs=1e-6)


def test_attribution_needs_its_pass_and_says_how():
    forget, retain = sparse([0.5, 0.5, 0.5]), sparse([0.01, 0.2, 0.01])
    with pytest.raises(InvalidConfig, match="attribute\\(lm, dictionary, scope, stats\\)"):
        AttributionScore()(stats(forget, retain))
    found = stats(forget, retain, attribution=torch.tensor([1.0, 5.0, 2.0]))
    assert select(found, AttributionScore(), 2) == (2, 0)


def test_selection_says_when_there_is_not_enough():
    found = stats(sparse([0.5, 0.3, 0.4, 0.0]), sparse([0.02, 0.0, 0.009, 0.0]))
    with pytest.raises(InvalidConfig, match="has 4 features; asked for 5"):
        select(found, SparsityScore(), 5)
    with pytest.raises(InvalidConfig, match="only 3 features of planted pass sparsity; asked for 4"):
        select(found, SparsityScore(), 4)


def test_equal_scores_go_to_the_lower_index():
    assert select(stats(sparse([0.5, 0.5, 0.5], seed=1), sparse([0.0] * 3)), SparsityScore(), 2) == (0, 1)


def test_the_control_fires_as_often_and_selects_nothing():
    forget, retain = sparse([0.5, 0.1, 0.48, 0.11, 0.3]), sparse([0.01, 0.0, 0.5, 0.1, 0.29])
    found = stats(forget, retain)
    chosen = select(found, SelectivityScore(), 2)
    assert chosen == (0, 1)
    assert matched_frequency(found, chosen) == (2, 3)
    with pytest.raises(InvalidConfig, match="fewer than 4"):
        matched_frequency(found, (0, 1, 2, 3))


class TestDirections:
    @pytest.fixture
    def samples(self):
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(6, 6, generator=generator)
        forget = torch.randn(4000, 6, generator=generator) @ mix + torch.tensor([2.0, -1, 0, 3, 0, 1])
        retain = torch.randn(6000, 6, generator=generator) @ mix
        return forget, retain

    @staticmethod
    def apply(chosen, x, target):
        acts = chosen.encode(x).acts
        return x + (target - acts) @ chosen.W_dec

    def of(self, samples):
        forget, retain = samples
        return Stats("x", Site("resid_post", 1), *(corpus(torch.zeros(len(x), 1), x=x) for x in (forget, retain)))

    def test_no_linear_probe_can_tell_the_corpora_apart_after_leace(self, samples):
        """The theorem: class means become equal, so the best linear predictor of the label is a constant."""
        chosen = leace(self.of(samples))
        forget, retain = (self.apply(chosen, x, 0.0) for x in samples)
        torch.testing.assert_close(forget.mean(0), retain.mean(0), rtol=1e-3, atol=1e-3)
        x = torch.cat([forget, retain]).double()
        y = torch.cat([torch.ones(len(forget)), torch.zeros(len(retain))]).double()
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        best = design @ torch.linalg.lstsq(design, y[:, None], driver="gelsd", rcond=1e-5).solution
        assert best.std() < 1e-3

    def test_leace_moves_points_no_further_than_ablating_the_means_does(self, samples):
        """Of all affine erasures it is the least damaging in expected squared distance."""
        mean, least = difference_of_means(self.of(samples)), leace(self.of(samples))
        x = torch.cat(samples)
        overall = x.mean(0)
        along = float(overall @ mean.W_enc[:, 0])
        moved_mean = (self.apply(mean, x, along) - x).square().sum(-1).mean()
        moved_least = (self.apply(least, x, 0.0) - x).square().sum(-1).mean()
        assert moved_least <= moved_mean * (1 + 1e-4)

    def test_a_unit_of_the_mean_direction_is_the_whole_difference(self, samples):
        forget, retain = samples
        chosen = difference_of_means(self.of(samples))
        torch.testing.assert_close(chosen.W_dec[0], forget.mean(0) - retain.mean(0))
        erased = self.apply(chosen, torch.cat(samples), 0.0)
        assert (erased @ chosen.W_dec[0]).abs().max() < 1e-3
        shift = chosen.encode(forget).acts - 1
        torch.testing.assert_close(
            forget + (shift - chosen.encode(forget).acts) @ chosen.W_dec, forget - chosen.W_dec[0], rtol=1e-4, atol=1e-4
        )
