from __future__ import annotations

import math

import pytest
import torch
from objectives.scenes import ALTERNATES, SPLITS, N, Scene, assert_same, gradients, told

from concept_unlearn.objectives import DPO, GA, NPO, TNPO, WGA, WTNPO, SimNPO


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


@pytest.fixture
def start() -> Scene:
    """The model is its reference."""
    scene = Scene.random()
    return Scene(scene.batches, scene.z, {s: z.detach().clone() for s, z in scene.z.items()}, scene.h, scene.h0)


def slope(objective, scene):
    return gradients(scene.loss(objective), scene.leaves)["z", "forget"]


def summed(scene):
    """The gradient of -seq_sum(c)."""
    step = scene.step(GA())
    return gradients(-step.seq_sum("forget", step.nll("forget")), scene.leaves)["z", "forget"]


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 1.0])
def test_npo_starts_at_twice_log_two_over_beta_as_ascent_on_sums(beta, start):
    assert start.loss(NPO(beta=beta)).item() == pytest.approx(2 * math.log(2) / beta)
    torch.testing.assert_close(slope(NPO(beta=beta), start), summed(start))


def test_npo_of_a_small_beta_is_ascent_on_sums_anywhere(scene):
    torch.testing.assert_close(slope(NPO(beta=1e-7), scene), summed(scene), rtol=1e-5, atol=1e-8)


def test_npo_weighs_a_sequence_by_how_much_of_it_is_left():
    step = told(NPO(beta=0.5), forget=N)
    (gradient,) = torch.autograd.grad(NPO(beta=0.5)(step), [step.nll("forget")])
    p, p0 = (torch.tensor([sum(row) for row in side]).neg().exp() ** 0.5 for side in N)
    w = (2 * p / (p + p0)).tolist()
    assert gradient.tolist() == pytest.approx([-w[0] / 2] * 4 + [-w[1] / 2])


def test_npo_fades_as_the_sequence_is_forgotten():
    losses = [NPO()(told(NPO(), forget=([[n]], [[1.0]]))).item() for n in (0.0, 1.0, 10.0, 100.0, 1e4)]
    assert losses == sorted(losses, reverse=True)
    assert all(loss >= 0 for loss in losses)
    assert losses[-1] == pytest.approx(0, abs=1e-9)


def test_npo_sums_over_a_sequence_and_does_not_average():
    total = NPO()(told(NPO(), forget=N)).item()
    assert total != pytest.approx(13.1945, abs=0.1)
    assert total == pytest.approx(12.2708, abs=1e-4)


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_tnpo_starts_as_ascent(beta, start):
    assert_same({0: slope(TNPO(beta=beta), start)}, {0: slope(GA(), start)})


@pytest.mark.parametrize("q", [0.9, 1e-2, 1e-6, 1e-30])
def test_tnpo_pushes_rare_tokens_as_well(q):
    c = [[-math.log(q)]]

    def weight(objective):
        step = told(objective, forget=(c, c))
        (gradient,) = torch.autograd.grad(objective(step), [step.nll("forget")])
        return -gradient.item()

    assert weight(TNPO()) == pytest.approx(1)
    published = weight(TNPO(compat="paper"))
    assert published == pytest.approx(2 * q**4 / (2 * q**4 + 1e-5))
    assert published < 0.01 or q == 0.9


def test_the_constant_of_the_published_code_spares_what_the_specification_says_it_does():
    for q, weight in ((0.056, 0.66), (0.01, 0.002)):
        step = told(TNPO(compat="paper"), forget=([[-math.log(q)]], [[-math.log(q)]]))
        (gradient,) = torch.autograd.grad(TNPO(compat="paper")(step), [step.nll("forget")])
        assert -gradient.item() == pytest.approx(weight, abs=0.005)


@pytest.mark.parametrize("compat", [None, "paper"])
def test_wtnpo_without_a_is_tnpo(compat, scene):
    one, other = TNPO(beta=2, compat=compat), WTNPO(beta=2, a=0, compat=compat)
    torch.testing.assert_close(scene.loss(one), scene.loss(other))
    torch.testing.assert_close(slope(one, scene), slope(other, scene))


def test_wtnpo_starts_as_ascent_weighted_by_a(start):
    assert_same({0: slope(WTNPO(a=1.5), start)}, {0: slope(WGA(beta=1.5), start)})


@pytest.mark.parametrize("objective", [TNPO(beta=2, compat="paper"), WTNPO(beta=2, a=0.5, compat="paper")], ids=repr)
def test_the_published_token_weights(objective):
    step = told(objective, forget=N)
    c, c0 = (torch.tensor([x for row in side for x in row], dtype=torch.float64) for side in N)
    probs, probs_oracle = (-c).exp(), (-c0).exp()
    a = getattr(objective, "a", 0)
    weights = 2 * probs ** (2 + a) / (probs**2 + probs_oracle**2 + 1e-5)
    assert objective(step).item() == pytest.approx(-(weights * c).mean().item())


def test_simnpo_needs_no_reference_and_no_second_token():
    objective = SimNPO()
    assert not any(read.reference for read in objective.reads(None))
    assert objective(told(objective, forget=([[2.0], [1.0]], [[9.0], [9.0]]))).isfinite()


def test_simnpo_divides_by_the_length():
    objective = SimNPO(beta=1)
    once, twice = (objective(told(objective, forget=([c], [c]))).item() for c in ([2.0], [2.0, 2.0]))
    assert once == twice == pytest.approx(2 * math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_margin_that_stands_inside_beta_is_beta_times_as_large(margin, scene):
    inside = SimNPO(beta=3, margin=margin, compat="open-unlearning")
    torch.testing.assert_close(scene.loss(inside), scene.loss(SimNPO(beta=3, margin=3 * margin)))


def test_simnpo_of_open_unlearning(scene):
    batch, z = scene.batches["forget"], scene.z["forget"]
    labels = batch.labels.where(batch.mask, -100)
    rows = [i for i in range(len(labels)) if labels[i, 0] == -100]  # theirs counts a label that nothing predicts
    labels, logits = labels[rows], z[rows]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(-1, -2), labels[:, 1:], reduction="none").sum(-1)
    loss = loss / (labels != -100).sum(-1) - 0.5
    expected = -torch.nn.functional.logsigmoid(4.5 * loss).mean() * 2 / 4.5
    torch.testing.assert_close(scene.rows(rows).loss(SimNPO(margin=0.5, compat="open-unlearning")), expected)


@pytest.mark.parametrize("preferred", ["refusal", "alternate"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_starts_where_npo_does_whichever_is_preferred(preferred, beta, start):
    objective = DPO(beta=beta, preferred=preferred)
    assert start.loss(objective).item() == pytest.approx(2 * math.log(2) / beta)
    found = gradients(start.loss(objective), start.leaves)
    torch.testing.assert_close(found["z", "forget"], summed(start))


def test_at_the_reference_alternate_and_original_may_change_places(start):
    turned = {"forget": "refusal", "refusal": "forget"}
    swapped = Scene(*({turned.get(s, s): x for s, x in own.items()} for own in vars(start).values()))
    torch.testing.assert_close(swapped.loss(DPO()), start.loss(DPO()))


def test_dpo_raises_one_answer_and_lowers_the_other():
    step = told(DPO(), forget=N, refusal=ALTERNATES)
    forget, refusal = torch.autograd.grad(DPO()(step), [step.nll("forget"), step.nll("refusal")])
    assert (forget < 0).all()
    assert (refusal > 0).all()


def test_dpo_scales(scene):
    torch.testing.assert_close(scene.loss(DPO(beta=0.5)), 4 * scene.loss(DPO(beta=0.5, scale="1")))


def test_an_alternate_that_is_the_answer_teaches_nothing():
    scene = Scene.random()
    same = dict.fromkeys(SPLITS, scene.batches["forget"])
    z, z0 = (dict.fromkeys(SPLITS, own["forget"]) for own in (scene.z, scene.z0))
    objective = DPO(preferred="alternate")
    loss = Scene(same, z, z0, scene.h, scene.h0).loss(objective)
    assert loss.item() == pytest.approx(2 * math.log(2) / 0.1)
    assert gradients(loss, scene.leaves)["z", "forget"].abs().max() < 1e-12


def test_a_beta_that_is_not_positive_is_refused():
    for member in (NPO, SimNPO, DPO):
        with pytest.raises(ValueError, match="greater than 0"):
            member(beta=0)
