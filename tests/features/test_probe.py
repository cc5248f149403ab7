"""A probe for whole texts pools as its gate does and finds what a plain logistic regression would."""

from __future__ import annotations

import pytest
import torch

from concept_unlearn.features.probe import Views, fit_probe, pool_views
from concept_unlearn.gates import ProbeGate, Signal


def draw(n_texts, length, *, marked, seed=0, d=12):
    """Texts of noise; in scope are those of which one token in ``marked`` points along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_texts, length, d, generator=generator, dtype=torch.float64)
    in_scope = torch.arange(n_texts) % 2 == 0
    x[in_scope, ::marked, 0] += 6.0
    start = torch.arange(n_texts) * length
    return x.flatten(0, 1), Views(start, start + length, in_scope, torch.ones(n_texts, dtype=torch.float64))


@pytest.mark.parametrize("pool", ["soft", "mean"])
def test_views_are_pooled_as_the_gate_pools_texts(pool):
    score = 30 * torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = Views(torch.tensor([0, 0, 13, 59]), torch.tensor([60, 6, 29, 60]), *[torch.ones(4)] * 2)
    for value, start, stop in zip(pool_views(score, views, pool), views.start, views.stop, strict=True):
        part = score[None, start:stop, None]
        tokens = torch.ones(part.shape[:2], dtype=torch.bool)
        expected = ProbeGate(pool=pool).statistic(Signal(part, tokens, tokens))[0]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_on_the_mean_it_is_ridge_logistic_regression():
    """The gradient of the stated objective vanishes, and the objective is convex."""
    tokens, views = draw(40, 8, marked=2)
    probe = fit_probe(tokens, views, pool="mean")
    means = tokens.view(40, 8, -1).mean(1)
    residual = torch.sigmoid(means @ probe.weight + probe.bias) - views.in_scope.double()
    torch.testing.assert_close(means.T @ residual, -probe.weight, rtol=1e-3, atol=1e-3)
    assert float(residual.sum()) == pytest.approx(0, abs=1e-3)


def test_classes_count_equally_whatever_their_weight():
    tokens, views = draw(40, 8, marked=2)
    heavier = views._replace(weight=torch.where(views.in_scope, 0.5, 1.5).double())
    one, other = fit_probe(tokens, views, pool="mean"), fit_probe(tokens, heavier, pool="mean")
    torch.testing.assert_close(one.weight, other.weight)


def test_the_soft_pool_finds_a_needle_that_the_mean_misses():
    def wrong(pool):
        probe = fit_probe(*draw(200, 40, marked=40), pool=pool)
        tokens, views = draw(400, 40, marked=40, seed=1)
        pooled = pool_views(tokens @ probe.weight, views, pool) + probe.bias
        return float(((pooled > 0) != views.in_scope).double().mean())

    assert wrong("soft") < 0.15
    assert wrong("soft") < wrong("mean") / 2
