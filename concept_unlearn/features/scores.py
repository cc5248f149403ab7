"""Which features belong to the forget set: published rules as rows over the same statistics.

A score gives one number a feature, larger is more of the concept, and minus infinity to features that its
rule drops.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from scipy import stats as scipy_stats
from torch import Tensor

from ..component import Component
from ..errors import InvalidConfig
from .stats import Stats


class Score(Component, family=True):
    """statistics -> one number a feature"""

    @abstractmethod
    def __call__(self, stats: Stats) -> Float[Tensor, " n_features"]: ...


class SparsityScore(Score):
    """Farrell et al. 2024 (arXiv 2410.19278), SAEBench: forget frequency, of features that retain text spares."""

    max_retain_rate: float = 0.01
    """Features that fire on this share of retain tokens or more are dropped. Published grid: 0.001, 0.01."""

    def __call__(self, stats: Stats) -> Tensor:
        return _keep(stats.forget.rate, stats.retain.rate < self.max_retain_rate)


class FisherScore(Score):
    """Dynamic SAE Guardrails (arXiv 2504.08192): E[a^2] on forget, of features with a high forget-retain ratio."""

    min_forget_percentile: float = 5.0
    min_ratio_percentile: float = 95.0

    def __call__(self, stats: Stats) -> Tensor:
        forget, retain = stats.forget.mean_square, stats.retain.mean_square
        ratio = forget / retain.clamp(min=1e-12)
        keep = (forget >= _percentile(forget, self.min_forget_percentile)) & (
            ratio >= _percentile(ratio, self.min_ratio_percentile)
        )
        return _keep(forget, keep & (forget > 0))


class CountScore(Score):
    """CRISP (arXiv 2508.13650): forget minus retain firing count, of the first ``top`` with a large mean ratio.

    Counts are per token, so that corpora of unequal length compare.
    """

    top: int = 10_000
    min_ratio: float = 3.0
    """Of A_forget / (A_retain + 1), A being the feature's summed activation per 1,000 tokens."""

    def __call__(self, stats: Stats) -> Tensor:
        difference = stats.forget.rate - stats.retain.rate
        forget, retain = stats.forget.mean * 1000, stats.retain.mean * 1000
        first = torch.zeros_like(difference, dtype=torch.bool)
        first[difference.topk(min(self.top, len(difference))).indices] = True
        return _keep(difference, first & (difference > 0) & (forget / (retain + 1) >= self.min_ratio))


class MeanDifferenceScore(Score):
    """SAeUron (arXiv 2501.18052): mu_f / sum mu_f - mu_r / sum mu_r."""

    def __call__(self, stats: Stats) -> Tensor:
        forget, retain = stats.forget.mean, stats.retain.mean
        return forget / forget.sum().clamp(min=1e-12) - retain / retain.sum().clamp(min=1e-12)


class SelectivityScore(Score):
    """Ours: forget frequency times log of the forget-retain ratio, of features with at least ``min_ratio``."""

    min_ratio: float = 5.0
    smoothing: float = 1e-4
    """Added to both frequencies, so that a single hit is no infinite ratio."""

    def __call__(self, stats: Stats) -> Tensor:
        ratio = (stats.forget.rate + self.smoothing) / (stats.retain.rate + self.smoothing)
        return _keep(stats.forget.rate * ratio.log(), ratio >= self.min_ratio)


class EnrichmentScore(Score):
    """CodeUnlearn (arXiv 2410.10866): log2 ratio of the sequences a feature fires in, where it is significant.

    Kept are features in at least ``min_sequences`` forget sequences, enriched at least twofold, that pass a
    chi-squared test (Fisher's exact one where an expected count is under 5) after Benjamini-Hochberg.
    """

    min_sequences: int = 5
    min_log2_ratio: float = 1.0
    false_discovery_rate: float = 0.05

    def __call__(self, stats: Stats) -> Tensor:
        n_f, n_r = stats.forget.n_sequences, stats.retain.n_sequences
        hits_f, hits_r = stats.forget.sequences, stats.retain.sequences
        log_ratio = ((hits_f + 0.5) / (n_f + 1)).log2() - ((hits_r + 0.5) / (n_r + 1)).log2()
        tested = hits_f >= self.min_sequences
        p = torch.ones(len(hits_f), dtype=torch.float64)
        for i in tested.nonzero()[:, 0].tolist():
            p[i] = _association_p(int(hits_f[i]), n_f, int(hits_r[i]), n_r)
        keep = tested.clone()
        if tested.any():
            adjusted = scipy_stats.false_discovery_control(p[tested].numpy(), method="bh")
            keep[tested] = torch.from_numpy(adjusted <= self.false_discovery_rate)
        return _keep(log_ratio, keep & (log_ratio >= self.min_log2_ratio))


class AUCScore(Score):
    """How well the feature alone, by its largest activation in a sequence, tells forget from retain sequences.

    From binned activations, four bins to a doubling; ties count half.
    """

    min_auc: float = 0.5

    def __call__(self, stats: Stats) -> Tensor:
        forget, retain = stats.forget.peaks.double(), stats.retain.peaks.double()
        below = retain.cumsum(-1) - retain
        auc = (forget * (below + retain / 2)).sum(-1) / (forget.sum(-1) * retain.sum(-1))
        return _keep(auc.float(), auc > self.min_auc)


class AttributionScore(Score):
    """Effect of a feature on forget answers: sum of a_i (W_dec[i] . d log p / d x), of features retain spares."""

    max_retain_rate: float = 0.05

    def __call__(self, stats: Stats) -> Tensor:
        if stats.attribution is None:
            raise InvalidConfig("attribution needs a backward pass: stats = attribute(lm, dictionary, scope, stats)")
        return _keep(stats.attribution, (stats.attribution > 0) & (stats.retain.rate < self.max_retain_rate))


def select(stats: Stats, score: Score, n: int) -> tuple[int, ...]:
    """The ``n`` features with the largest score, best first; equal ones by index.

    Raises InvalidConfig if the dictionary has fewer, or the score's rule leaves fewer.
    """
    if not 0 < n <= stats.n_features:
        raise InvalidConfig(f"{stats.dictionary} has {stats.n_features} features; asked for {n}")
    values = score(stats)
    passing = int(values.isfinite().sum())
    if passing < n:
        raise InvalidConfig(
            f"only {passing} features of {stats.dictionary} pass {score.kind}; asked for {n}: ask for fewer, or "
            f"loosen {', '.join(type(score).model_fields) or 'the choice of score'}"
        )
    order = values.sort(descending=True, stable=True).indices
    return tuple(order[:n].tolist())


def matched_frequency(stats: Stats, features: tuple[int, ...], *, max_ratio: float = 2.0) -> tuple[int, ...]:
    """The control that belongs beside every selection: features that fire as often on forget text, unselectively.

    For each feature the one nearest in forget frequency among those with a forget-retain ratio of at most
    ``max_ratio``, none twice and none of ``features``.
    """
    rate, retain = stats.forget.rate, stats.retain.rate
    free = (rate > 0) & (rate <= max_ratio * retain)
    free[list(features)] = False
    chosen = []
    for i in features:
        if not free.any():
            raise InvalidConfig(f"{stats.dictionary} has fewer than {len(features)} unselective features to match")
        distance = torch.where(free, (rate - rate[i]).abs(), torch.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return tuple(chosen)


def _keep(values: Tensor, keep: Tensor) -> Float[Tensor, " n_features"]:
    return torch.where(keep, values, -torch.inf)


def _percentile(values: Tensor, q: float) -> float:
    return float(values.double().quantile(q / 100))


def _association_p(hits_f: int, n_f: int, hits_r: int, n_r: int) -> float:
    table = [[hits_f, n_f - hits_f], [hits_r, n_r - hits_r]]
    if hits_f + hits_r == n_f + n_r:
        return 1.0
    expected = scipy_stats.contingency.expected_freq(table)
    if expected.min() < 5:
        return float(scipy_stats.fisher_exact(table).pvalue)
    return float(scipy_stats.chi2_contingency(table, correction=False).pvalue)
