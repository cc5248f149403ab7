from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives.scenes import ALTERNATES, VOCAB, N, Scene, gradients, told

from concept_unlearn.objectives import AnswerPreservation, RetainKL, RetainNLL


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


@pytest.fixture
def start() -> Scene:
    scene = Scene.random()
    return Scene(scene.batches, scene.z, {s: z.detach().clone() for s, z in scene.z.items()}, scene.h, scene.h0)


KL = [RetainKL(), RetainKL(where="content"), RetainKL(compat="open-unlearning")]


def divergences(scene):
    return F.kl_div(
        scene.z["retain"].log_softmax(-1), scene.z0["retain"].log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def test_going_on_learning_is_the_usual_loss(scene):
    batch = scene.batches["retain"]
    labels = batch.labels.where(batch.mask, -100)[:, 1:]
    expected = F.cross_entropy(scene.z["retain"][:, :-1].reshape(-1, VOCAB), labels.reshape(-1))
    torch.testing.assert_close(scene.loss(RetainNLL()), expected)


@pytest.mark.parametrize("objective", KL, ids=repr)
def test_the_divergence_is_zero_at_the_reference_and_positive_elsewhere(objective, scene, start):
    assert start.loss(objective).item() == pytest.approx(0, abs=1e-12)
    assert gradients(start.loss(objective), start.leaves)["z", "retain"].abs().max() < 1e-12
    assert scene.loss(objective) > 0


def test_the_divergence_is_the_reference_from_the_model(scene):
    use = scene.batches["retain"].positions()
    p, p0 = (own["retain"].softmax(-1)[use] for own in (scene.z, scene.z0))
    torch.testing.assert_close(scene.loss(RetainKL()), (p0 * (p0 / p).log()).sum(-1).mean())
    assert not torch.isclose(scene.loss(RetainKL()), (p * (p / p0).log()).sum(-1).mean())


def test_the_divergence_of_all_content_takes_the_prompt_in(scene):
    use = scene.batches["retain"].positions("content")
    torch.testing.assert_close(scene.loss(RetainKL(where="content")), divergences(scene)[use].mean())


def test_the_published_divergence_is_of_all_positions_and_so_of_padding(scene):
    found = scene.loss(RetainKL(compat="open-unlearning"))
    torch.testing.assert_close(found, divergences(scene).mean())
    assert not torch.isclose(found, scene.loss(RetainKL()))


def test_equal_answers_and_refusals_cost_log_two_over_beta():
    step = told(AnswerPreservation(), retain=N, retain_refusal=([[4.7], [2.0]], [[0.0], [0.0]]))
    assert AnswerPreservation()(step).item() == pytest.approx(math.log(2) / 0.1)
    assert math.log(2) / 0.1 == pytest.approx(6.931472, abs=1e-6)


def test_preservation_raises_the_answer_lowers_the_refusal_and_fades():
    objective = AnswerPreservation(beta=0.5)
    step = told(objective, retain=N, retain_refusal=ALTERNATES)
    answer, refusal = torch.autograd.grad(objective(step), [step.nll("retain"), step.nll("retain_refusal")])
    gap = torch.tensor([6.0 - 4.7, 5.0 - 2.0], dtype=torch.float64)
    w = torch.sigmoid(-0.5 * gap) / 2
    torch.testing.assert_close(refusal, -w)
    torch.testing.assert_close(answer, w[[0, 0, 0, 0, 1]])
    wide = told(objective, retain=N, retain_refusal=([[900.0], [900.0]], [[0.0], [0.0]]))
    assert objective(wide).item() == pytest.approx(0)


def test_preservation_asks_no_reference():
    assert not any(read.reference for read in AnswerPreservation().reads(None))
