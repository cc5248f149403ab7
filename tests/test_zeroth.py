"""The estimator's theorems: exact where it can be, unbiased where it is said to be, wrong by as much as it is said."""

from __future__ import annotations

import pytest
import torch

from concept_unlearn.component import build
from concept_unlearn.errors import InvalidConfig, NonFinite
from concept_unlearn.zeroth import Walk, Zeroth, descend, directions, estimate, n_queries


def drawn(n, like, seed=0):
    return directions(n, like, torch.Generator().manual_seed(seed))


def linear(d, seed=1):
    c = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return c, lambda points: points @ c + 3.0


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("beta", [0.01, 1.0, 50.0])
def test_along_a_direction_a_linear_function_is_exact(sides, beta):
    """One direction: g = d (c . u) u, whatever the step."""
    c, f = linear(40)
    w = torch.randn(40, dtype=torch.float64)
    u = drawn(1, w)
    found = estimate(f, w, u, beta=beta, sides=sides)
    torch.testing.assert_close(found.gradient, 40 * (u[0] @ c) * u[0])
    torch.testing.assert_close(estimate(f, w, u, beta=beta, sides=sides, unbiased=False).gradient, (u[0] @ c) * u[0])


@pytest.mark.parametrize("sides", [1, 2])
def test_with_b_d_a_linear_function_is_unbiased_and_with_b_1_a_dth_of_it(sides):
    c, f = linear(40)
    w = torch.zeros(40, dtype=torch.float64)
    u = drawn(200_000, w)
    for unbiased, want in ((True, c), (False, c / 40)):
        found = estimate(f, w, u, beta=0.1, sides=sides, unbiased=unbiased).gradient
        assert (found - want).norm() < 0.015 * want.norm()


@pytest.mark.parametrize(("sides", "want"), [(1, 2.1), (2, 2.0)])
def test_of_a_square_one_side_errs_by_beta_and_two_do_not(sides, want):
    """w^2 at 1 along +1 with beta 0.1."""
    one = torch.ones(1, dtype=torch.float64)
    found = estimate(lambda w: w[:, 0] ** 2, one, one[None], beta=0.1, sides=sides)
    assert float(found.gradient) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("sides", "order"), [(1, 1), (2, 2)])
def test_the_error_falls_with_the_step_and_with_its_square(sides, order):
    one = torch.ones(1, dtype=torch.float64)
    errors = [
        abs(float(estimate(lambda w: w[:, 0].exp(), one, one[None], beta=b, sides=sides).gradient) - float(one.exp()))
        for b in (0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.02)


def test_directions_are_of_unit_length_uniform_and_drawn_from_the_generator_alone():
    like = torch.zeros(3, 4)
    u = drawn(50_000, like)
    torch.testing.assert_close(u.flatten(1).norm(dim=1), torch.ones(50_000))
    torch.testing.assert_close(u.flatten(1).T @ u.flatten(1) / 50_000, torch.eye(12) / 12, rtol=0, atol=2e-3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(drawn(9, like), drawn(9, like))
    assert not torch.equal(drawn(9, like), drawn(9, like, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sides", [1, 2])
def test_an_estimate_asks_as_often_as_the_formula_says(sides):
    asked = []
    w = torch.zeros(5)
    estimate(lambda points: asked.append(len(points)) or points.sum(1), w, drawn(7, w), beta=0.1, sides=sides)
    assert 4 * sum(asked) == n_queries(4, 7, sides) == {1: 4 * 8, 2: 4 * 14}[sides]


class Bowl:
    """|w - 1|^2 for a client who pays ``batch`` queries a point."""

    def __init__(self, batch=1):
        self.batch, self.queries, self.points = batch, 0, []

    def __call__(self, points, step):
        self.queries += self.batch * len(points)
        self.points.append((step, points))
        return (points - 1).square().flatten(1).sum(1)


def run(settings, bowl, walk=None, each=None):
    return descend(
        bowl, walk or Walk.start(torch.zeros(2, 3, dtype=torch.float64)), settings,
        cost=n_queries(bowl.batch, settings.q, settings.sides), spent=lambda: bowl.queries, each=each,
    )  # fmt: skip


@pytest.mark.parametrize(("optimiser", "lr"), [("adam", 0.1), ("sgd", 0.1)])
@pytest.mark.parametrize("sides", [1, 2])
def test_it_goes_down(optimiser, lr, sides):
    found = run(Zeroth(optimiser=optimiser, lr=lr, sides=sides, budget=4000, q=8), Bowl())
    assert (found.w - 1).norm() < 0.05


@pytest.mark.parametrize(("budget", "steps"), [(96, 1), (191, 1), (192, 2), (1000, 10)])
def test_the_budget_is_hard_and_no_estimate_is_left_half_paid(budget, steps):
    bowl = Bowl(batch=3)
    assert run(Zeroth(budget=budget), bowl).step == steps
    assert bowl.queries == steps * 96 <= budget


def test_a_budget_too_small_for_one_estimate_is_an_error_and_nothing_is_spent():
    bowl = Bowl(batch=3)
    with pytest.raises(InvalidConfig, match="a budget of 95 queries does not pay for one estimate, which takes 96"):
        run(Zeroth(budget=95), bowl)
    assert bowl.queries == 0


def test_the_optimiser_gets_the_estimate():
    """A step of plain descent is lr times the estimate from the points that were asked, not the gradient."""
    bowl, settings = Bowl(), Zeroth(q=2, lr=0.1, optimiser="sgd", budget=4, beta=0.5)
    found = run(settings, bowl)
    u = (bowl.points[0][1][:2]) / 0.5
    want = estimate(lambda p: (p - 1).square().flatten(1).sum(1), torch.zeros_like(found.w), u, beta=0.5).gradient
    torch.testing.assert_close(found.w, -0.1 * want)
    assert (found.w - 0.2).norm() > 0.1  # the true gradient at 0 is -2


def test_the_learning_rate_decays_to_what_was_asked():
    """Of a function that is linear in one dimension an estimate is exact, so a step is the learning rate."""
    spent, seen = [0], [0.0]

    def f(points, step):
        spent[0] += len(points)
        return points[:, 0]

    settings = Zeroth(optimiser="sgd", lr=0.05, decay=0.01, budget=100, q=5)
    descend(
        f, Walk.start(torch.zeros(1, dtype=torch.float64)), settings,
        cost=10, spent=lambda: spent[0], each=lambda walk, _: seen.append(float(walk.w)),
    )  # fmt: skip
    taken = -torch.tensor(seen, dtype=torch.float64).diff()
    torch.testing.assert_close(taken, 0.05 * 0.01 ** (torch.arange(10, dtype=torch.float64) / 9))


def test_a_descent_goes_on_from_where_it_was_stopped_to_the_same_bytes():
    settings, seen = Zeroth(budget=640), []
    whole = run(settings, Bowl(), each=lambda walk, _: seen.append(walk))
    again = Bowl()
    again.queries = 32 * 7
    assert torch.equal(run(settings, again, seen[6]).w, whole.w)
    assert torch.equal(run(settings, Bowl()).w, whole.w)
    assert not torch.equal(run(Zeroth(budget=640, seed=1), Bowl()).w, whole.w)


def test_a_value_that_is_none_is_named():
    with pytest.raises(NonFinite, match="the loss of step 1"):
        descend(
            lambda points, step: torch.full((len(points),), torch.nan),
            Walk.start(torch.zeros(3)), Zeroth(), cost=32, spent=lambda: 0,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"q": 0}, {"beta": 0}, {"sides": 3}, {"budget": 0}, {"optimiser": "lion"}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        build(Zeroth, wrong)
