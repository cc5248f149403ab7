"""A change of a parameter: added in float32 and rounded once, exact where it is zero, the same after a file."""

from __future__ import annotations

import json

import pytest
import torch

from concept_unlearn.errors import InvalidConfig, PatchMismatch, UnknownName
from concept_unlearn.weights import Dense, LowRank, Sparse, restore_delta

MASKED = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DELTAS = {
    "dense": lambda: Dense(draw(5, 7)),
    "low_rank": lambda: LowRank(draw(5, 2), draw(2, 7, seed=1)),
    "sparse": lambda: Sparse(draw(int(MASKED.sum())), MASKED),
}


@pytest.fixture(params=list(DELTAS))
def delta(request):
    return DELTAS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_added_is_computed_wide_and_rounded_once(delta, dtype, strength):
    weight = draw(5, 7, seed=2).to(dtype)
    before = weight.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    added = delta.added_to(weight, strength)
    assert torch.equal(added, (weight.to(wide) + strength * delta.dense().to(wide)).to(dtype))
    assert added.dtype == dtype
    assert torch.equal(weight, before)


def test_where_nothing_changes_every_bit_stays():
    weight = draw(5, 7).to(torch.bfloat16)
    weight[0, 0], weight[0, 1], weight[0, 2] = -0.0, float("nan"), float("inf")
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[4] = True
    for added in (
        Sparse(torch.ones(7), mask).added_to(weight),
        Dense(mask.float()).added_to(weight),
        Dense(draw(5, 7)).added_to(weight, 0.0),
        LowRank(torch.zeros(5, 1), torch.ones(1, 7)).added_to(weight),
    ):
        assert torch.equal(added[:4].view(torch.int16), weight[:4].view(torch.int16))
        assert added.data_ptr() != weight.data_ptr()


def test_all_three_kinds_of_one_change_agree():
    up, down = draw(5, 2), draw(2, 7, seed=1)
    full, everywhere = up @ down, torch.ones(5, 7, dtype=torch.bool)
    weight = draw(5, 7, seed=2)
    for delta in (LowRank(up, down), Sparse(full.flatten(), everywhere)):
        assert torch.equal(delta.added_to(weight, 0.5), Dense(full).added_to(weight, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_saved_change_is_the_same_to_the_last_bit(delta, dtype):
    kept = delta.to(dtype)
    again = restore_delta(json.loads(json.dumps(kept.spec())), kept.tensors())
    assert type(again) is type(delta)
    assert torch.equal(again.dense(), kept.dense())
    assert all(t.dtype in (dtype, torch.uint8) for t in again.tensors().values())
    assert (again.shape, again.n_parameters) == ((5, 7), delta.n_parameters)
    assert again.dense().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(8,), (9,), (3, 5), (2, 3, 4), (1,), (0, 4)], ids=str)
def test_a_mask_takes_one_bit_an_entry(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    delta = Sparse(torch.arange(1.0, int(mask.sum()) + 1), mask)
    packed = delta.tensors()["mask"]
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-mask.numel() // 8))
    assert torch.equal(restore_delta(delta.spec(), delta.tensors()).mask, mask)
    assert torch.equal(delta.dense()[mask], delta.values)


def test_scaling_scales_the_change_and_keeps_the_kind(delta):
    torch.testing.assert_close(delta.scaled(-2.0).dense(), -2.0 * delta.dense())
    assert type(delta.scaled(3.0)) is type(delta)
    assert delta.to(torch.bfloat16).scaled(3.0).tensors().keys() == delta.tensors().keys()


def test_it_counts_the_numbers_that_it_holds():
    found = {name: make().n_parameters for name, make in DELTAS.items()}
    assert found == {"dense": 35, "low_rank": 24, "sparse": int(MASKED.sum())}


def test_a_change_is_detached_from_what_it_was_trained_with():
    up = torch.nn.Parameter(draw(5, 2))
    assert not LowRank(up, draw(2, 7)).added_to(draw(5, 7)).requires_grad


def test_another_shape_is_refused_and_only_a_product_is_reshaped(delta):
    assert delta.fits((5, 7))
    for shape in ((7, 5), (5, 8), (36,)):  # a matrix of the transposed shape is another one, not a reshaped one
        assert not delta.fits(shape)
        with pytest.raises(PatchMismatch, match=r"shape \(5, 7\) does not fit a weight of shape \("):
            delta.added_to(torch.zeros(shape))
    assert delta.fits((5, 1, 7)) == isinstance(delta, LowRank)


def test_a_product_reaches_heads_by_reshape():
    delta = LowRank(draw(6, 2), draw(2, 4))
    assert torch.equal(delta.added_to(torch.zeros(2, 3, 4)), delta.dense().view(2, 3, 4))


def test_what_is_no_change_is_refused():
    with pytest.raises(InvalidConfig, match=r"given: torch\.int64"):
        Dense(torch.zeros(2, dtype=torch.long))
    with pytest.raises(InvalidConfig, match="boolean mask and one value"):
        Sparse(torch.ones(2), torch.ones(2))
    with pytest.raises(InvalidConfig, match=r"given: torch\.bool"):
        Dense(MASKED)
    with pytest.raises(InvalidConfig, match=r"given: torch\.float16"):
        Dense(torch.zeros(2)).to(torch.float16)
    with pytest.raises(InvalidConfig, match=r"\[out, r\] and \[r, in\]; given: \(5, 2\) and \(3, 7\)"):
        LowRank(draw(5, 2), draw(3, 7))
    with pytest.raises(InvalidConfig, match="over 3 entries and values of shape"):
        Sparse(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(UnknownName, match="known: dense, low_rank, sparse"):
        restore_delta({"kind": "loha"}, {})
