"""Fusing linear maps from second moments: the least squares that they stand for, exactly."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from concept_unlearn.errors import EmptyData, InvalidConfig, NonFinite, PatchMismatch
from concept_unlearn.weights.fusion import fuse_maps, gram, with_ones

D, OUT = 5, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def requests():
    """Inputs and maps of three requests; no request's inputs span the space, all of them together do."""
    inputs = [draw(n, 2, seed=n) @ draw(2, D, seed=n + 1) for n in (4, 7, 9)]
    return inputs, [draw(D, OUT, seed=i) for i in range(3)]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_golden():
    grams = [torch.eye(2), torch.diag(torch.tensor([4.0, 0.0]))]
    maps = [torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [5.0]])]
    close(fuse_maps(grams, maps, ridge=0), torch.tensor([[2.6], [1.0]], dtype=torch.float64), 1e-12)
    close(fuse_maps(grams, maps), torch.tensor([[2.6], [1.0]], dtype=torch.float64), 1e-5)


def test_it_is_least_squares_on_the_stacked_system(requests):
    inputs, maps = requests
    stacked, wanted = torch.cat(inputs), torch.cat([x @ w for x, w in zip(inputs, maps, strict=True)])
    expected = torch.linalg.lstsq(stacked, wanted).solution
    close(fuse_maps([gram(x) for x in inputs], maps, ridge=0), expected, 1e-8)


def test_without_a_ridge_nothing_is_left_of_the_normal_equations(requests):
    inputs, maps = requests
    grams = [gram(x) for x in inputs]
    fused = fuse_maps(grams, maps, ridge=0)
    close(sum(g @ (fused - w) for g, w in zip(grams, maps, strict=True)), torch.zeros(D, OUT).double())


def test_one_map_and_equal_maps_come_back_whatever_the_inputs(requests):
    inputs, (w, *_) = requests
    grams = [gram(x) for x in inputs]
    close(fuse_maps(grams[:1], [w]), w)
    close(fuse_maps(grams, [w, w, w]), w)
    close(fuse_maps(grams, [w, w, w], ridge=10.0), w)


def test_where_no_input_says_anything_it_is_the_mean():
    grams, maps = [torch.diag(torch.tensor([1.0, 0.0]))] * 2, [draw(2, OUT, seed=i) for i in range(2)]
    close(fuse_maps(grams, maps)[1], (maps[0] + maps[1])[1] / 2)


def test_the_order_of_the_requests_changes_nothing(requests):
    inputs, maps = requests
    for ridge in (0.0, 1e-6, 0.1):
        found = [
            fuse_maps([gram(inputs[i]) for i in order], [maps[i] for i in order], ridge=ridge)
            for order in permutations(range(3))
        ]
        assert all((f - found[0]).abs().max() < 1e-8 for f in found)


def test_orthogonal_requests_are_each_recovered_exactly():
    """Without a ridge the sum is singular here, and the solution of least norm is taken."""
    basis = torch.linalg.qr(draw(D, D)).Q
    inputs = [draw(6, 2, seed=1) @ basis[:2], draw(8, 2, seed=2) @ basis[2:4]]
    maps = [draw(D, OUT, seed=3), draw(D, OUT, seed=4)]
    fused = fuse_maps([gram(x) for x in inputs], maps, ridge=0)
    for x, w in zip(inputs, maps, strict=True):
        close(x @ fused, x @ w)
    close(basis[4] @ fused, torch.zeros(OUT).double())
    by_ridge = fuse_maps([gram(x) for x in inputs], maps)
    assert all((x @ (by_ridge - w)).abs().max() < 1e-4 for x, w in zip(inputs, maps, strict=True))


def test_a_bias_is_the_row_that_meets_the_column_of_ones():
    x, w, b = draw(9, D), draw(D, OUT, seed=1), draw(OUT, seed=2)
    stacked = torch.cat([w, b[None]])
    close(with_ones(x) @ stacked, x @ w + b)
    close(fuse_maps([gram(with_ones(x))], [stacked], ridge=0), stacked)


def test_gram_matrices_of_batches_add_up():
    x = draw(20, D)
    close(sum(gram(part) for part in x.split([3, 1, 0, 16])), gram(x))


def test_fusing_in_turn_is_fusing_at_once(requests):
    """As far as the ridge lets it: the fused map with the sum of the Gram matrices stands for what went into it."""
    inputs, maps = requests
    grams = [gram(x) for x in inputs]
    first = fuse_maps(grams[:2], maps[:2], ridge=0)
    close(fuse_maps([grams[0] + grams[1], grams[2]], [first, maps[2]], ridge=0), fuse_maps(grams, maps, ridge=0))


def test_low_precision_is_fused_in_float64(requests):
    inputs, maps = requests
    short = [w.to(torch.bfloat16) for w in maps]
    grams = [gram(x.float()) for x in inputs]
    assert all(g.dtype == torch.float64 for g in grams)
    close(fuse_maps(grams, short), fuse_maps(grams, [w.double() for w in short]))


@pytest.mark.parametrize(
    ("grams", "maps", "ridge", "error", "says"),
    [
        ([], [], 0.0, InvalidConfig, "0 maps"),
        ([torch.eye(2)], [torch.ones(2, 1)] * 2, 0.0, InvalidConfig, "1 Gram"),
        ([torch.eye(2)], [torch.ones(2, 1)], -1.0, InvalidConfig, "a ridge of -1"),
        ([torch.eye(2)] * 2, [torch.ones(2, 1), torch.ones(2, 3)], 0.0, PatchMismatch, "one shape"),
        ([torch.eye(3)], [torch.ones(2, 1)], 0.0, PatchMismatch, r"\(3, 3\)"),
        ([torch.zeros(2, 2)], [torch.ones(2, 1)], 1e-6, EmptyData, "no input was seen"),
        ([torch.full((2, 2), torch.nan)], [torch.ones(2, 1)], 1e-6, NonFinite, "NaN"),
    ],
)
def test_it_says_what_does_not_fit(grams, maps, ridge, error, says):
    with pytest.raises(error, match=says):
        fuse_maps(grams, maps, ridge=ridge)
