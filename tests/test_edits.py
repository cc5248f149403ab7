from __future__ import annotations

import pytest
import torch

from concept_unlearn.edits import Clamp, DenseClamp, Mean, Refuse, Relative, Scale, Shift, Zero
from concept_unlearn.errors import InvalidConfig

ACTS = torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.0, 0.0]])
UNIT = torch.full_like(ACTS, 10.0)


@pytest.mark.parametrize(
    ("edit", "targets"),
    [
        (Zero(), [[0, 0, 0], [0, 0, 0]]),
        (Scale(by=-6.0), [[0, -3, -12], [0, 0, 0]]),
        (Clamp(to=-20.0), [[0, -20, -20], [0, 0, 0]]),
        (Clamp(to=-20.0, above=1.0), [[0, 0.5, -20], [0, 0, 0]]),
        (Clamp(to=Relative(-0.5)), [[0, -5, -5], [0, 0, 0]]),
        (DenseClamp(to=-20.0), [[-20, -20, -20], [-20, -20, -20]]),
        (DenseClamp(to=Relative(0.1)), [[1, 1, 1], [1, 1, 1]]),
        (Shift(by=-2.0), [[-2, -1.5, 0], [-2, -2, -2]]),
        (Mean(values=(7.0, 8.0, 9.0)), [[0, 8, 9], [0, 0, 0]]),
        (Refuse(to=3.0), [[0, 0.5, 3], [0, 0, 0]]),
        (Refuse(to=3.0, dense=True), [[0, 0.5, 3], [0, 0, 3]]),
        (Refuse(to=3.0, above=0.6), [[0, 0.5, 2], [0, 0, 0]]),
    ],
    ids=repr,
)
def test_targets(edit, targets):
    torch.testing.assert_close(edit(ACTS, UNIT), torch.tensor(targets, dtype=torch.float32))


@pytest.mark.parametrize("edit", [Zero(), Scale(by=-6.0), Clamp(), Mean(values=(1.0, 1.0, 1.0)), Refuse()], ids=repr)
def test_a_dead_feature_is_the_identity(edit):
    dead = torch.zeros(4, 3)
    assert torch.equal(edit(dead, UNIT[:1].expand(4, 3)), dead)


def test_scaling_by_one_and_shifting_by_nothing_change_no_bit():
    assert torch.equal(Scale(by=1.0)(ACTS, UNIT), ACTS)
    assert torch.equal(Shift(by=0.0)(ACTS, UNIT), ACTS)


def test_scaling_by_zero_is_zero():
    assert torch.equal(Scale(by=0.0)(ACTS, UNIT), Zero()(ACTS, UNIT))


def test_mean_takes_its_values_from_the_statistics_unless_given():
    means = torch.tensor([1.0, 2.0, 3.0])
    assert Mean().fitted(means) == Mean(values=(1.0, 2.0, 3.0))
    assert Mean(values=(0.0, 0.0, 0.0)).fitted(means) == Mean(values=(0.0, 0.0, 0.0))
    assert Clamp().fitted(means) == Clamp()
    with pytest.raises(InvalidConfig, match="one value for each of 3"):
        Mean()(ACTS, UNIT)
