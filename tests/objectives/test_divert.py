from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives.scenes import VOCAB, Scene, assert_same, fixture_l, gradients, make_batch, make_batches

from concept_unlearn.errors import EmptyData
from concept_unlearn.objectives import CEU, IDK, ME, UNDIAL, Margin
from concept_unlearn.step import Batch


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


def slope(objective, scene, split="forget"):
    return gradients(scene.loss(objective), scene.leaves)["z", split]


def with_logits(scene, z):
    leaves = {s: z.clone().requires_grad_() for s in scene.z} if torch.is_tensor(z) else z
    return Scene(scene.batches, leaves, scene.z0, scene.h, scene.h0)


def onehot(scene):
    return F.one_hot(F.pad(scene.batches["forget"].ids[:, 1:], (0, 1)), VOCAB).double()


def published_labels(batch):
    return batch.labels.where(batch.mask, -100)


# IDK


def test_refusing_is_plain_learning_of_the_refusals(scene):
    batch = scene.batches["refusal"]
    logits, labels = scene.z["refusal"][:, :-1], published_labels(batch)[:, 1:]
    expected = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
    torch.testing.assert_close(scene.loss(IDK()), expected)
    assert {read.split for read in IDK().reads(None)} == {"refusal"}


# ME


@pytest.mark.parametrize("direction", ["model_to_uniform", "uniform_to_model"])
@pytest.mark.parametrize("reduction", ["seq_mean", "token_mean"])
def test_entropy_is_maximal_if_and_only_if_the_logits_are_constant(direction, reduction, scene):
    objective = ME(direction=direction, reduction=reduction)
    assert scene.loss(objective) > 0
    flat = with_logits(scene, torch.randn(*scene.z["forget"].shape[:2], 1).double().expand(-1, -1, VOCAB))
    assert flat.loss(objective).item() == pytest.approx(0, abs=1e-12)
    assert slope(objective, flat).abs().max() < 1e-12


def test_the_two_directions_have_different_slopes(scene):
    use = scene.batches["forget"].positions("content")
    log_p = scene.z["forget"].detach()[use].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    one, other = (
        slope(ME(direction=direction, reduction="token_mean"), scene)[use]
        for direction in ("model_to_uniform", "uniform_to_model")
    )
    torch.testing.assert_close(one, log_p.exp() * (log_p + entropy) / use.sum())
    torch.testing.assert_close(other, (log_p.exp() - 1 / VOCAB) / use.sum())


def test_entropy_is_of_question_and_answer(scene):
    batch = scene.batches["forget"]
    moved = slope(ME(), scene).abs().sum(-1) > 0
    expected = torch.zeros_like(batch.mask)
    for i, length in enumerate(batch.mask.sum(-1)):
        expected[i, : length - 1] = True
    assert torch.equal(moved, expected)


def test_entropy_of_a_logit_that_is_sure_is_finite():
    z = torch.full((1, 2, VOCAB), -1e4).double()
    z[..., 3] = 1e4
    scene = Scene.random(batches={s: make_batch((1, 1)) for s in make_batches()})
    sure = with_logits(scene, z)
    assert sure.loss(ME()).item() == pytest.approx(math.log(VOCAB))
    assert slope(ME(), sure).isfinite().all()


def test_the_published_entropy(scene):
    batch, z = scene.batches["forget"], scene.z["forget"]
    labels = batch.ids.where(batch.mask, -100)[:, 1:]  # question and answer
    soft_outputs = z[:, :-1].softmax(-1).view(-1, VOCAB)
    uniform = torch.full_like(soft_outputs, 1 / VOCAB)
    loss_mask = (labels != -100).view(-1)
    kl_div = F.kl_div((soft_outputs + 1e-12).log(), uniform, reduction="none").sum(-1)
    expected = (kl_div * loss_mask).sum() / loss_mask.sum()
    torch.testing.assert_close(scene.loss(ME(compat="paper")), expected)
    torch.testing.assert_close(
        scene.loss(ME(compat="paper")), scene.loss(ME(direction="uniform_to_model", reduction="token_mean"))
    )


# UNDIAL


@pytest.mark.parametrize("beta", [0.0, 3.0, 10.0])
def test_undial_pulls_towards_the_lowered_reference(beta, scene):
    use = scene.batches["forget"].positions()
    t = (scene.z0["forget"] - beta * onehot(scene)).softmax(-1).detach()
    expected = (scene.z["forget"].detach().softmax(-1) - t)[use] / use.sum()
    torch.testing.assert_close(slope(UNDIAL(beta=beta), scene)[use], expected)


def test_undial_is_done_where_the_model_is_the_lowered_reference(scene):
    done = with_logits(scene, (scene.z0["forget"] - 4 * onehot(scene)).detach())
    assert slope(UNDIAL(beta=4), done).abs().max() < 1e-12
    start = with_logits(scene, scene.z0["forget"].detach())
    assert slope(UNDIAL(beta=0), start).abs().max() < 1e-12
    assert slope(UNDIAL(beta=4), start).abs().max() > 1e-3


def test_undial_by_ever_more_is_cross_entropy_unlearning_at_the_reference(scene):
    start = with_logits(scene, scene.z0["forget"].detach())
    assert_same(
        {0: slope(UNDIAL(beta=1e3), start), 1: start.loss(UNDIAL(beta=1e3))},
        {0: slope(CEU(skip=0), start), 1: start.loss(CEU(skip=0))},
    )


def test_the_published_undial():
    vocab = 103
    scene = Scene.random(batches=make_batches(vocab=vocab), vocab=vocab)
    batch, student, teacher = scene.batches["forget"], scene.z["forget"], scene.z0["forget"]
    shift_labels = published_labels(batch)[:, 1:]
    mask = torch.zeros_like(teacher[:, :-1])
    rows, places = torch.arange(mask.shape[0]).view(-1, 1, 1), torch.arange(mask.shape[1]).view(1, -1, 1)
    mask[rows, places, shift_labels[..., None]] = 1.0
    soft_label = (teacher[:, :-1] - mask * 3).softmax(-1)
    expected = F.cross_entropy(student[:, :-1].reshape(-1, vocab), soft_label.reshape(-1, vocab), reduction="none")
    assert mask[..., vocab - 100].sum() > 30  # prompt and padding
    found = scene.loss(UNDIAL(beta=3, compat="open-unlearning"))
    torch.testing.assert_close(found, expected.mean())
    assert_same(
        gradients(found, scene.leaves),
        gradients(expected.mean(), scene.leaves),
    )


# CEU


def test_cross_entropy_unlearning_pulls_towards_itself_without_the_answer(scene):
    use = scene.batches["forget"].positions()
    z = scene.z["forget"].detach()
    p = z.softmax(-1)
    t = p * (1 - onehot(scene))
    t = t / t.sum(-1, keepdim=True)
    found = slope(CEU(skip=0), scene)[use] * use.sum()
    torch.testing.assert_close(found, (p - t)[use])
    labelled = onehot(scene)[use].bool()
    assert torch.allclose(found[labelled], p[use][labelled])  # t_y is 0 exactly


@pytest.mark.parametrize("skip", [0, 1, 2, 5])
def test_the_first_tokens_of_each_answer_are_skipped(skip, scene):
    batch = scene.batches["forget"]
    expected = torch.zeros_like(batch.mask)
    for i, row in enumerate(batch.positions()):
        expected[i, row.nonzero()[skip:, 0]] = True
    assert torch.equal(slope(CEU(skip=skip), scene).abs().sum(-1) > 0, expected)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_the_published_cross_entropy_unlearning(skip, scene):
    logits, labels = scene.z["forget"], published_labels(scene.batches["forget"])
    labels[:, 0] = -100  # theirs counts a label that nothing predicts among those it skips
    valid_mask = labels != -100
    labels = labels.masked_fill((valid_mask.cumsum(-1) <= skip) & valid_mask, -100)
    valid = labels[:, 1:] != -100
    z, y = logits[:, :-1][valid], labels[:, 1:][valid]
    target = z.detach().clone().scatter_(-1, y[:, None], -math.inf).softmax(-1)
    torch.testing.assert_close(scene.loss(CEU(skip=skip)), F.cross_entropy(z, target))


def test_if_all_answers_are_skipped_it_says_so(scene):
    with pytest.raises(EmptyData):
        scene.loss(CEU(skip=50))


# Margin


def test_the_margin_is_zero_if_and_only_if_the_logits_are_constant(scene):
    flat = with_logits(scene, torch.ones_like(scene.z["forget"]))
    assert flat.loss(Margin()) == 0
    assert not slope(Margin(), flat).any()
    assert scene.loss(Margin()) > 0


def test_the_margin_does_not_see_a_shift_of_all_logits(scene):
    lifted = with_logits(scene, {s: z + 7 for s, z in scene.z.items()})
    torch.testing.assert_close(lifted.loss(Margin()), scene.loss(Margin()))


def test_the_published_margin(scene):
    batch = scene.batches["forget"]
    logits = scene.z["forget"].reshape(-1, VOCAB)
    loss = (logits.max(-1)[0] - logits.mean(-1)) ** 2
    mask = (published_labels(batch) != -100).reshape(-1)
    torch.testing.assert_close(scene.loss(Margin(compat="open-unlearning")), (loss * mask).sum() / mask.sum())


def test_the_published_margin_reads_behind_the_end_and_not_before_the_answer():
    batch = make_batch((3, 2), (2, 1))
    scene = Scene.random(batches={s: Batch(*batch[:3]) for s in make_batches()})
    ours, theirs = (
        slope(o, scene).abs().sum(-1).nonzero().tolist() for o in (Margin(), Margin(compat="open-unlearning"))
    )
    assert ours == [[0, 2], [0, 3], [1, 1]]
    assert theirs == [[0, 3], [0, 4], [1, 2]]


def test_fixture_l_has_the_entropy_it_should():
    p = fixture_l().z["forget"][0, 0].softmax(-1)
    assert -(p * p.log()).sum().item() == pytest.approx(0.947537, abs=1e-6)
