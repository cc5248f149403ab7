"""Labels of a class are its own, mass on them is the class's, and a focal loss without focus is cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.methods.families import check_families, focal, frequency_mapping, map_labels


def test_a_class_is_worth_the_mean_of_its_labels():
    p = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    torch.testing.assert_close(map_labels(p, [(0, 1), (3,)]), torch.tensor([[0.2, 0.4]]))
    torch.testing.assert_close(map_labels(p, [(0, 1), (3,)], normalise=True), torch.tensor([[1 / 3, 2 / 3]]))


@pytest.mark.parametrize("label", [2, 3, 5])
def test_mass_on_one_class_is_that_class(label):
    """The authors' reshape interleaves the classes and gives (0.5, 0.5)."""
    one_hot = F.one_hot(torch.tensor([label]), 6).float()
    families = [(2, 3, 5), (0, 1, 4)]
    torch.testing.assert_close(map_labels(one_hot, families, normalise=True), torch.tensor([[1.0, 0.0]]))
    everywhere = torch.zeros(1, 6)
    everywhere[0, [2, 3, 5]] = 1.0  # scores that need not sum to 1
    torch.testing.assert_close(map_labels(everywhere, families), torch.tensor([[1.0, 0.0]]))


def test_focal_loss_golden_value():
    found = focal(torch.tensor([[0.7, 0.3]]), torch.tensor([0]), g=2.0)
    assert float(found) == pytest.approx(0.032101, abs=5e-7)


def test_without_focus_it_is_cross_entropy():
    logits, label = torch.randn(9, 3), torch.randint(3, (9,))
    found = focal(logits.softmax(1), label, g=0.0)
    torch.testing.assert_close(found, F.cross_entropy(logits, label, reduction="none"))
    omega = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(focal(logits.softmax(1), label, g=0.0, omega=omega), omega[label] * found)


def test_no_mass_at_all_is_a_large_loss_and_no_infinity():
    found = focal(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert 50 < float(found) < math.inf


def test_a_label_goes_to_the_class_that_ranks_it_higher_and_at_equal_ranks_to_the_higher_score():
    first = torch.tensor([[0.40, 0.30, 0.20, 0.05, 0.05, 0.00]])
    second = torch.tensor([[0.50, 0.00, 0.30, 0.15, 0.00, 0.05]])
    # 0: rank 0 in both, 0.5 > 0.4; 2: rank 2 and rank 1; 3: rank 3 and rank 2; 1 and 4 the first's, 5 the second's
    assert frequency_mapping([first, second], 2) == [(1, 4), (0, 2)]
    with pytest.raises(InvalidConfig, match="class 0 has 2 tokens that no other class wants more; asked for 3"):
        frequency_mapping([first, second], 3)


def test_only_an_examples_top_labels_take_part():
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4]])
    assert frequency_mapping([rows], 2, top=1) == [(0, 1)]
    many = torch.arange(100).float()[None]
    assert frequency_mapping([many], 30) == [tuple(range(99, 69, -1))]
    with pytest.raises(InvalidConfig, match="30 tokens"):
        frequency_mapping([many], 31)


def test_families_are_disjoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = frequency_mapping([torch.rand(5, 50, generator=generator) for _ in range(3)], 4)
        check_families(dict(zip("abc", found, strict=True)))


@pytest.mark.parametrize(
    ("families", "error", "match"),
    [
        ({"refusal": (), "answer": (1,)}, EmptyData, "family of refusal tokens is empty"),
        ({"refusal": (3, 4), "answer": (1, 3)}, InvalidConfig, "token 3 is in the families of both refusal and answer"),
    ],
)
def test_families_that_tell_nothing_apart(families, error, match):
    with pytest.raises(error, match=match):
        check_families(families)
