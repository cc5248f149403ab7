from __future__ import annotations

import pytest
import torch
from objectives.scenes import VOCAB, N, Scene, assert_same, gradients, told

from concept_unlearn.objectives import GA, WGA, CappedGA, Hinge, RetainNLL, SatImp, TemperatureGA


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


def assert_equal(one, other, scene):
    """Losses and gradients."""
    torch.testing.assert_close(scene.loss(one), scene.loss(other))
    assert_same(gradients(scene.loss(one), scene.leaves), gradients(scene.loss(other), scene.leaves))


def test_ascent_goes_where_learning_comes_from(scene):
    step = scene.step(GA())
    learn = step.token_mean("forget", step.nll("forget"))
    climb = gradients(scene.loss(GA()), scene.leaves)["z", "forget"]
    assert torch.equal(climb, -gradients(learn, scene.leaves)["z", "forget"])


@pytest.mark.parametrize(
    ("limit", "objective"),
    [
        (GA(), WGA(beta=0)),
        (GA(), SatImp(beta1=0, beta2=0)),
        (WGA(beta=3), SatImp(beta1=3, beta2=0)),
        (GA(), CappedGA(keep=1)),
        (GA(), TemperatureGA(temperature=1)),
    ],
    ids=repr,
)
def test_limits(limit, objective, scene):
    assert_equal(limit, objective, scene)


def test_a_weight_carries_no_gradient_of_its_own():
    step = told(WGA(beta=2), forget=N)
    c = step.nll("forget")
    (gradient,) = torch.autograd.grad(WGA(beta=2)(step), [c])
    torch.testing.assert_close(gradient, -(-2 * c.detach()).exp() / 5)


def test_satimp_leaves_the_certain_and_the_unknown_alone():
    step = told(SatImp(), forget=([[0.0, 1e4, 1.0]], [[0.0, 0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(SatImp()(step), [step.nll("forget")])
    assert (gradient != 0).tolist() == [False, False, True]


@pytest.mark.parametrize("objective", [Hinge(delta=3), Hinge(delta=3, normalise="batch"), Hinge(delta=2, score="mean")])
def test_hinge_leaves_a_sequence_alone_once_it_is_forgotten(objective):
    step = told(objective, forget=([[0.2, 1.0, 3.0, 0.5], [3.0], [1.0], [0.5, 0.6]], [[0.0]] * 4))
    (gradient,) = torch.autograd.grad(objective(step), [step.nll("forget")])
    spared = [0, 1, 2, 3, 4] if objective.score == "sum" else [4]
    assert [i for i, g in enumerate(gradient.tolist()) if g == 0] == spared


def test_hinge_stops_exactly_at_delta():
    step = told(Hinge(delta=2), forget=([[2.0], [1.0]], [[0.0], [0.0]]))
    (gradient,) = torch.autograd.grad(Hinge(delta=2)(step), [step.nll("forget")])
    assert gradient.tolist() == [0, -1]


def test_hinge_by_the_mean_does_not_care_how_long_an_answer_is():
    by_mean, by_sum = Hinge(delta=2, score="mean"), Hinge(delta=2)
    twice = ([[1.5], [1.5, 1.5]], [[0.0], [0.0, 0.0]])
    assert by_mean(told(by_mean, forget=twice)).item() == 0.5
    assert by_sum(told(by_sum, forget=twice)).item() == 0.5
    (gradient,) = torch.autograd.grad(by_mean(step := told(by_mean, forget=twice)), [step.nll("forget")])
    assert gradient.tolist() == [-0.5, -0.25, -0.25]


@pytest.mark.parametrize("normalise", ["active", "batch"])
def test_when_nothing_is_left_hinge_is_zero_and_retention_goes_on(normalise, scene):
    hinge = Hinge(delta=0.0, normalise=normalise)
    step = scene.step(hinge, RetainNLL())
    assert hinge(step).item() == 0
    found = gradients(hinge(step) + RetainNLL()(step), scene.leaves)
    assert not found["z", "forget"].any()
    assert found["z", "retain"].abs().sum() > 0


def test_two_hinges_of_one_step_count_apart(scene):
    one, other = Hinge(delta=6), Hinge(delta=12)
    seen = []
    step = scene.step(one, other)
    step.agree = lambda name, count: seen.append((name, int(count))) or count
    for hinge in (one, other):
        hinge(step)
    assert len({name for name, _ in seen}) == 2
    assert seen[0][1] < seen[1][1]


@pytest.mark.parametrize(("keep", "kept"), [(0.01, 1), (0.2, 1), (0.4, 2), (0.59, 2), (0.6, 3), (0.8, 4), (1.0, 5)])
def test_capped_ascent_keeps_the_likeliest_tokens_of_each_sequence(keep, kept):
    objective = CappedGA(keep=keep)
    step = told(objective, forget=([[0.5, 4.0, 0.1, 2.0, 1.0], [9.0]], [[0.0] * 5, [0.0]]))
    (gradient,) = torch.autograd.grad(objective(step), [step.nll("forget")])
    expected = [i in [2, 0, 4, 3, 1][:kept] for i in range(5)] + [True]
    assert (gradient != 0).tolist() == expected
    assert gradient[gradient != 0].tolist() == pytest.approx([-1 / (kept + 1)] * (kept + 1))


def test_a_share_that_comes_out_whole_is_not_rounded_down():
    step = told(CappedGA(keep=0.29), forget=([[1.0] * 100], [[0.0] * 100]))
    (gradient,) = torch.autograd.grad(CappedGA(keep=0.29)(step), [step.nll("forget")])
    assert 0.29 * 100 < 29
    assert (gradient != 0).sum() == 29


def test_of_equal_tokens_the_first_are_kept():
    step = told(CappedGA(keep=0.5), forget=([[1.0] * 5, [1.0] * 4], [[0.0] * 5, [0.0] * 4]))
    (gradient,) = torch.autograd.grad(CappedGA(keep=0.5)(step), [step.nll("forget")])
    assert (gradient != 0).tolist() == [True, True, False, False, False, True, True, False, False]


def test_temperature_softens_the_push(scene):
    found = gradients(scene.loss(TemperatureGA(temperature=3)), scene.leaves)["z", "forget"]
    batch, z = scene.batches["forget"], scene.z["forget"].detach()
    use = batch.positions()
    onehot = torch.nn.functional.one_hot(batch.ids.roll(-1, 1), VOCAB)
    torch.testing.assert_close(found[use], -((z / 3).softmax(-1) - onehot)[use] / 3 / use.sum())
