"""Merging changes: goldens, limits and symmetries of sum, mean, task arithmetic and TIES."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from concept_unlearn.errors import InvalidConfig, PatchMismatch
from concept_unlearn.weights.merge import mean, task_arithmetic, ties, total

RULES = {
    "sum": total,
    "mean": mean,
    "ties": ties,
    "ties-half": partial(ties, density=0.5),
    "arithmetic": lambda inputs: task_arithmetic(inputs, [0.5] * len(inputs)),
}


def draw(seed, *shape):
    return torch.randn(*(shape or (4, 5)), generator=torch.Generator().manual_seed(seed))


def of(*values):
    return {"w": torch.tensor(values)}


@pytest.mark.parametrize(
    ("density", "golden"),
    [
        (1.0, (3, -1.5, 0.5, 2)),
        (0.5, (3, -1.5, 0, 2)),  # (3, -1, 0, 0) and (0, -2, 0, 2)
        (0.25, (3, -2, 0, 0)),  # (3, 0, 0, 0) and (0, -2, 0, 0): of equal magnitudes, one
        (0.0, (0, 0, 0, 0)),
    ],
)
def test_ties_by_hand(density, golden):
    second = (-1.0, -2.0, 0.5, 1.9) if density == 0.25 else (-1.0, -2.0, 0.5, 2.0)
    found = ties([of(3.0, -1.0, 0.5, 0.0), of(*second)], density)["w"]
    assert torch.equal(found, torch.tensor(golden, dtype=torch.float32))


def test_opposite_changes_cancel_and_nothing_is_biased_upwards():
    x = draw(0)
    assert not ties([{"w": x}, {"w": -x}])["w"].any()
    assert not total([{"w": x}, {"w": -x}])["w"].any()


def test_the_larger_sum_elects_the_sign_however_many_disagree():
    assert ties([of(1.0), of(1.0), of(-3.0)])["w"].tolist() == [-3]
    assert ties([of(1.0), of(1.0), of(-1.5)])["w"].tolist() == [1]
    assert ties([of(1.0), of(1.0), of(-2.0)])["w"].tolist() == [0]


@pytest.mark.parametrize("name", RULES)
def test_neither_sign_is_preferred_and_a_scale_goes_through(name):
    inputs = [{"w": draw(i)} for i in range(3)]
    want = RULES[name](inputs)["w"]
    for factor in (-1, 4, -0.5):
        assert torch.equal(RULES[name]([{"w": factor * given["w"]} for given in inputs])["w"], factor * want)


@pytest.mark.parametrize("rule", [mean, ties], ids=["mean", "ties"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_equal_changes_give_the_change_to_the_last_bit(rule, n):
    x = draw(1)
    assert torch.equal(rule([{"w": x}] * n)["w"], x)


def test_changes_of_different_entries_add_up_under_ties():
    inputs = [draw(i) * (torch.arange(20).view(4, 5) % 3 == i) for i in range(3)]
    assert torch.equal(ties([{"w": x} for x in inputs])["w"], sum(inputs))


@pytest.mark.parametrize("name", RULES)
def test_order_does_not_matter(name):
    inputs = [{"w": draw(i), "b": draw(i, 3)} for i in range(4)]
    want = RULES[name](inputs)
    for order in itertools.permutations(inputs):
        found = RULES[name](order)
        assert all(torch.equal(found[k], want[k]) for k in want)


def test_trimming_keeps_exactly_the_largest_entries_of_each_tensor():
    x = torch.tensor([1.0, 1.0, 1.0, -5.0, 0.5, 1.0])
    for density, n in ((0.5, 3), (0.34, 2), (0.1, 0)):
        kept = ties([{"w": x}], density)["w"]
        assert int((kept != 0).sum()) == n
        assert n == 0 or kept[3] == -5


def test_a_tensor_that_an_input_lacks_counts_as_zeros():
    with_it, without = {"w": draw(0), "b": draw(1, 3)}, {"w": draw(2)}
    filled = without | {"b": torch.zeros(3)}
    for rule in RULES.values():
        found, want = rule([with_it, without]), rule([with_it, filled])
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) for k in want)
    assert torch.equal(mean([with_it, without])["b"], draw(1, 3) / 2)


def test_arithmetic_weighs_each_input_and_contains_sum_and_negation():
    inputs = [{"w": draw(0)}, {"w": draw(1)}]
    assert torch.equal(task_arithmetic(inputs, [1, 1])["w"], total(inputs)["w"])
    assert torch.equal(task_arithmetic(inputs, [-1, 0])["w"], -draw(0))
    with pytest.raises(InvalidConfig, match="one weight an input: 2; given: 1"):
        task_arithmetic(inputs, [1.0])


@pytest.mark.parametrize("name", RULES)
def test_results_are_float32_unless_an_input_is_float64_and_inputs_stay(name):
    low, high = {"w": draw(0).bfloat16()}, {"w": draw(1).double()}
    kept = low["w"].clone()
    assert RULES[name]([low, low])["w"].dtype == torch.float32
    assert RULES[name]([low, high])["w"].dtype == torch.float64
    assert torch.equal(low["w"], kept)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(InvalidConfig, match="nothing to merge"):
        mean([])
    with pytest.raises(InvalidConfig, match=r"0 to 1; given: 1\.5"):
        ties([of(1.0)], 1.5)
    with pytest.raises(PatchMismatch, match="w has different shapes"):
        total([of(1.0), of(1.0, 2.0)])
