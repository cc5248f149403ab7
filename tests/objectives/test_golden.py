"""The golden numbers of the specification, section 7."""

from __future__ import annotations

import pytest
import torch
from objectives.scenes import ALTERNATES, NO_MODEL, SITE, SPLITS, D, N, fixture_l, make_batch, told

from concept_unlearn.objectives import (
    CEU,
    DPO,
    GA,
    IDK,
    ME,
    NPO,
    RMU,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    AnswerPreservation,
    CappedGA,
    Hinge,
    Margin,
    RetainEmbedding,
    RetainKL,
    RetainNLL,
    SatImp,
    SimNPO,
    TemperatureGA,
)
from concept_unlearn.objectives.representation import _direction
from concept_unlearn.step import Reading, Step

FIXTURE_N = [
    (GA(), -1.34), (RetainNLL(), 1.34),
    (WGA(), -0.250985), (WGA(beta=5), -0.0242896), (SatImp(), -0.00676492),
    (NPO(), 12.270827), (NPO(beta=0.5), 1.573325), (NPO(beta=1), 0.527640),
    (TNPO(), -0.223144), (WTNPO(), -0.0652487),
    (SimNPO(), 0.00114779), (SimNPO(beta=2.5), 0.0233427), (SimNPO(margin=0.5), 0.00188937),
    (SimNPO(margin=0.5, compat="open-unlearning"), 0.0106690),
    (DPO(), 11.614371), (DPO(scale="1"), 0.580719), (DPO(preferred="alternate"), 11.614371),
    (IDK(), 5.5), (AnswerPreservation(), 5.923067),
    (Hinge(delta=3), 1.0), (Hinge(delta=3, normalise="batch"), 0.5), (Hinge(), 2.65),
    (CappedGA(), -0.925), (CappedGA(keep=0.5), -0.9),
]  # fmt: skip
FIXTURE_L = [
    (ME(), 0.438757), (ME(direction="uniform_to_model"), 0.553895), (ME(compat="paper"), 0.553895),
    (UNDIAL(beta=3), 2.030402), (UNDIAL(), 2.075972), (RetainKL(), 0.202722), (CEU(skip=0), 1.864979),
    (Margin(), 2.25), (TemperatureGA(), -0.787337), (GA(), -0.440190),
]  # fmt: skip


def label(case):
    return repr(case) if not isinstance(case, float) else ""


@pytest.mark.parametrize(("objective", "value"), FIXTURE_N, ids=label)
def test_fixture_n(objective, value):
    step = told(objective, forget=N, retain=N, refusal=ALTERNATES, alternate=ALTERNATES, retain_refusal=ALTERNATES)
    assert objective(step).item() == pytest.approx(value, rel=5e-6)


@pytest.mark.parametrize(("objective", "value"), FIXTURE_L, ids=label)
def test_fixture_l(objective, value):
    assert fixture_l().loss(objective).item() == pytest.approx(value, rel=5e-6)


def test_the_three_reductions_differ_as_soon_as_lengths_do():
    step = told(GA(), forget=N)
    c = step.nll("forget")
    found = [reduce("forget", c).item() for reduce in (step.token_mean, step.seq_sum, step.seq_mean)]
    assert found == pytest.approx([1.34, 3.35, 1.5875])


@pytest.mark.parametrize(
    ("objective", "slopes"),
    [
        (NPO(), [0.856008, 0.975005]),
        (TNPO(), [0.802625, 0.166345, 0.000671, 0.620051, 0.238406]),
    ],
    ids=["npo", "tnpo"],
)
def test_weights_on_fixture_n(objective, slopes):
    step = told(objective, forget=N)
    (gradient,) = torch.autograd.grad(objective(step), [step.nll("forget")])
    found = -gradient * 5 if objective.kind == "tnpo" else -gradient[[0, 4]] * 2
    assert found.tolist() == pytest.approx(slopes, abs=6e-7)


def test_the_model_at_the_reference_gives_twice_the_logarithm_of_two_over_beta():
    for objective in (NPO(), DPO()):
        at_start = told(objective, forget=(N[0], N[0]), refusal=(ALTERNATES[0], ALTERNATES[0]))
        assert objective(at_start).item() == pytest.approx(13.862944, abs=1e-6)


def far(*squares: float) -> torch.Tensor:
    """Activations whose squared distance from 0, divided by d, is this."""
    return torch.tensor(squares, dtype=torch.float64).sqrt()[:, None].expand(-1, D)


@pytest.mark.parametrize("objective", [RMU(), RMU(compat="open-unlearning"), RetainEmbedding()], ids=repr)
def test_fixture_r(objective):
    batch = make_batch((1, 4), (1, 1))
    distances = torch.zeros(2, 5, D, dtype=torch.float64)
    distances[batch.positions(objective._where)] = far(0.5, 1.5, 0.75, 1.25, 6)
    origin = objective.k * _direction(0, D) if objective.kind == "rmu" else torch.ones(D)
    batches, reads = dict.fromkeys(SPLITS, batch), objective.reads(NO_MODEL)
    step = Step(NO_MODEL, batches, reads, head=object(), reference=Still(origin))
    step._passes |= {s: Reading(None, {SITE: distances + origin}) for s in SPLITS}
    assert objective(step).item() == pytest.approx(3.125 if objective.compat else 3.5)


class Still:
    def __init__(self, origin):
        self.origin = origin

    def activations(self, split, batch, site, where):
        return self.origin.expand(int(batch.lengths(where).sum()), -1)
