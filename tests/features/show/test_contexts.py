"""One pass holds what sorting everything would give, whatever the batches."""

from __future__ import annotations

import pytest
import torch

from concept_unlearn.errors import EmptyData
from concept_unlearn.features.show.contexts import N_BINS, ContextFitter, edge

N, WINDOW, K = 3, 2, 5


@pytest.fixture
def passages():
    """Activations with many ties, half of them zero."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (17,), generator=draw).tolist()
    return [(torch.randint(-3, 4, (n, K), generator=draw).clamp(min=0) / 2).float() for n in sizes]


def fitted(passages, order, size, unmeasured=()):
    fitter = ContextFitter(K, n=N, window=WINDOW)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        acts = torch.cat([passages[i] for i in batch])
        owner = torch.cat([torch.full((len(passages[i]),), i) for i in batch])
        measured = torch.tensor([(i, t) not in unmeasured for i in batch for t in range(len(passages[i]))])
        fitter.update(acts, measured, owner)
    return fitter


def by_sorting(passages, feature):
    found = sorted(
        ((-float(a[:, feature].max()), i, int(a[:, feature].argmax())) for i, a in enumerate(passages)),
    )
    return [(i, t) for value, i, t in found if value < 0][:N]


@pytest.mark.parametrize("size", [1, 4, 17])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_held_is_what_sorting_all_would_give(passages, size, backwards):
    order = list(range(len(passages)))[:: -1 if backwards else 1]
    fitter = fitted(passages, order, size)
    for feature in range(K):
        peaks = fitter.peaks(feature)
        assert [(p.passage, p.position) for p in peaks] == by_sorting(passages, feature)
        for passage, position, acts in peaks:
            own = torch.nn.functional.pad(passages[passage][:, feature], (WINDOW, WINDOW))
            assert acts == own[position : position + 2 * WINDOW + 1].tolist()


@pytest.mark.parametrize("size", [1, 4, 17])
def test_counts_are_those_of_all_tokens(passages, size):
    fitter, whole = fitted(passages, range(len(passages)), size), torch.cat(passages)
    for feature in range(K):
        rate, acts = fitter.rate(feature), whole[:, feature]
        assert (rate.fired, rate.tokens, rate.passages) == (int((acts > 0).sum()), len(whole), len(passages))
        density = fitter.density(feature)
        for i in range(N_BINS):
            inside = (acts >= edge(i)) & (acts < edge(i + 1))
            assert density[i] == int(inside.sum())


def test_what_is_held_does_not_grow_with_the_text(passages):
    def n_numbers(fitter):
        return sum(v.numel() for v in vars(fitter).values() if isinstance(v, torch.Tensor))

    assert n_numbers(fitted(passages, [0], 1)) == n_numbers(fitted(passages * 20, range(17 * 20), 4))


def test_a_token_that_is_not_measured_is_neither_counted_nor_a_peak(passages):
    loud = [a.clone() for a in passages]
    loud[3][0] = 1000.0
    fitter = fitted(loud, range(len(loud)), 4, unmeasured={(3, 0)})
    loud[3][0] = 0.0
    for feature in range(K):
        assert [(p.passage, p.position) for p in fitter.peaks(feature)] == by_sorting(loud, feature)
        assert fitter.rate(feature).tokens == sum(map(len, passages)) - 1


def test_activations_beyond_the_last_bin_are_in_it():
    fitter = ContextFitter(1, n=1, window=0)
    fitter.update(torch.tensor([[1e-9], [1e9]]), torch.ones(2, dtype=torch.bool), torch.tensor([0, 0]))
    assert fitter.density(0) == [1, *[0] * (N_BINS - 2), 1]


def test_nothing_measured_has_no_rate():
    with pytest.raises(EmptyData):
        ContextFitter(1, n=1, window=0).rate(0)


def test_what_is_skipped_is_counted_and_shown_but_no_peak(passages):
    loud = [torch.cat([torch.full((1, K), 50.0), a]) for a in passages]
    fitter = ContextFitter(K, n=N, window=WINDOW, skip=[1] * len(loud))
    for i, acts in enumerate(loud):
        fitter.update(acts, torch.ones(len(acts), dtype=torch.bool), torch.full((len(acts),), i))
    for feature in range(K):
        peaks = fitter.peaks(feature)
        assert [(p.passage, p.position - 1) for p in peaks] == by_sorting(passages, feature)
        assert all(50.0 in p.acts for p in peaks if p.position <= WINDOW)
        assert fitter.rate(feature).fired == sum(int((a[:, feature] > 0).sum()) for a in loud)
