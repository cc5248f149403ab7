"""What holds for all objectives, shown on logits and activations that are given."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives.registry import EVERY, MASKED, NEEDS_MORE, OURS, each
from objectives.scenes import NO_MODEL, SITE, SPLITS, VOCAB, Scene, assert_same, gradients, in_parts, make_batch, widen

from concept_unlearn.errors import EmptyData, InvalidData
from concept_unlearn.objectives import (
    CEU,
    DPO,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    AnswerPreservation,
    CappedGA,
    Hinge,
    Objective,
    SatImp,
)
from concept_unlearn.step import Batch, Step

CHOOSES = ("hinge", "capped_ga", "ceu", "depart")
"""Those that leave some of the supervised tokens alone."""
BY_TOKEN = (
    "ga",
    "wga",
    "sat_imp",
    "capped_ga",
    "temperature_ga",
    "tnpo",
    "wtnpo",
    "idk",
    "undial",
    "ceu",
    "retain_nll",
)
BLIND = ("me", "margin", "depart", "follow", "rmu", "retain_kl", "retain_embedding")
"""Those that read where the labels are, not what they are."""


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


def test_the_registry_is_the_specification():
    assert set(Objective.members) == {
        "ga", "wga", "npo", "tnpo", "wtnpo", "sim_npo", "dpo", "idk", "me", "undial", "ceu", "sat_imp", "margin", "rmu",
        "hinge", "capped_ga", "temperature_ga", "retain_nll", "retain_kl", "retain_embedding", "answer_preservation",
        "depart", "lower_features", "follow",
    }  # fmt: skip


def test_only_the_retaining_terms_say_that_they_retain():
    assert {k for k, member in Objective.members.items() if member.retains} == {
        "retain_nll", "retain_kl", "retain_embedding", "answer_preservation"
    }  # fmt: skip


@each(EVERY)
def test_it_is_a_finite_number_with_a_gradient_and_asks_for_no_more_than_it_declares(objective, scene):
    loss = scene.loss(objective)
    assert loss.shape == ()
    assert loss.isfinite()
    declared = {read.split for read in objective.reads(NO_MODEL) if not read.reference}
    led_to = {split for (_, split), g in gradients(loss, scene.leaves).items() if g.abs().sum() > 0}
    assert led_to == declared
    assert all(g.isfinite().all() for g in gradients(scene.loss(objective), scene.leaves).values())


@each(EVERY)
def test_a_split_that_is_missing_is_named(objective, scene):
    reads = objective.reads(NO_MODEL)
    missing = reads[0].split
    step = scene.step(objective)
    step._batches = {split: b for split, b in scene.batches.items() if split != missing}
    with pytest.raises(InvalidData, match=f"the split '{missing}'"):
        objective(step)


@each(MASKED)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_padding_changes_nothing_whatever_stands_there(objective, scene, left, right):
    padded = scene.map(
        lambda x: F.pad(x, (0, 0, left, right), value=math.nan),
        {s: widen(b, left, right) for s, b in scene.batches.items()},
    )
    torch.testing.assert_close(padded.loss(objective), scene.loss(objective))
    assert_same(
        gradients(padded.loss(objective), scene.leaves), gradients(scene.loss(objective), scene.leaves), atol=1e-9
    )


@each(EVERY)
def test_the_order_of_the_batch_changes_nothing(objective, scene):
    turned = scene.rows([5, 2, 7, 0, 1, 6, 3, 4])
    torch.testing.assert_close(turned.loss(objective), scene.loss(objective))
    assert_same(gradients(turned.loss(objective), scene.leaves), gradients(scene.loss(objective), scene.leaves))


@each(EVERY)
@pytest.mark.parametrize("cuts", [((0, 1), (2, 3), (4, 5), (6, 7)), ((3,), (0, 1, 2, 4, 5, 6, 7))], ids=["4x2", "1+7"])
def test_the_parts_of_a_step_add_up_to_the_step(objective, scene, cuts):
    parts = [scene.rows(rows) for rows in cuts]
    losses = in_parts(
        objective,
        [lambda whole, tally, part=part: part.loss(objective, whole=whole, tally=tally) for part in parts],
        [part.batches for part in parts],
    )
    torch.testing.assert_close(torch.stack(losses).sum(), scene.loss(objective))
    found = [gradients(loss, scene.leaves) for loss in losses]
    summed = {k: torch.stack([g[k] for g in found]).sum(0) for k in scene.leaves}
    assert_same(summed, gradients(scene.loss(objective), scene.leaves), rtol=1e-7)


@each(EVERY)
def test_few_logits_at_a_time_give_the_same(objective, scene):
    torch.testing.assert_close(scene.loss(objective, chunk=3 * VOCAB), scene.loss(objective))
    assert_same(
        gradients(scene.loss(objective, chunk=3 * VOCAB), scene.leaves), gradients(scene.loss(objective), scene.leaves)
    )


def test_the_first_scored_position_is_the_one_before_the_answer():
    batch = make_batch((3, 4), (0, 2), (1, 1))
    assert batch.positions("answer").nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [0, 5], [1, 0], [2, 0]]
    assert widen(batch, 2, 0).positions("answer").nonzero()[0].tolist() == [0, 4]
    assert widen(batch, 2, 0).lengths().tolist() == batch.lengths().tolist() == [4, 1, 1]


@each(EVERY)
def test_it_moves_the_positions_that_it_declares_and_no_others(objective, scene):
    found = gradients(scene.loss(objective), scene.leaves)
    for split, batch in scene.batches.items():
        moved = sum(found[what, split].abs().sum(-1) for what in ("z", "h")) > 0
        declared = [r.where for r in objective.reads(NO_MODEL) if r.split == split and not r.reference]
        may = batch.positions(declared[0]) if declared else torch.zeros_like(batch.mask)
        if objective.kind == "undial" and objective.compat:
            may = F.pad(may[:, 1:], (0, 1))
        assert not (moved & ~may).any()
        assert objective.kind in CHOOSES or torch.equal(moved, may)


@pytest.mark.parametrize(
    ("kind", "where"),
    [(k, "answer") for k in Objective.members if k not in ("me", *NEEDS_MORE)] + [("me", "content")],
)
def test_it_reads_what_predicts_the_answer(kind, where):
    assert {read.where for read in Objective.members[kind]().reads(NO_MODEL)} == {where}


@each(
    [o for o in EVERY if o.kind not in (*BLIND, "hinge", "capped_ga")]
    + [Hinge(delta=1e3), Hinge(delta=1e3, score="mean"), CappedGA(keep=1)]  # so that they choose the same again
)
def test_a_label_concerns_only_the_logits_before_it(objective, scene):
    split = objective.reads(NO_MODEL)[-1].split
    batch = scene.batches[split]
    row, t = 2, int(batch.positions()[2].nonzero()[-1]) + 1
    ids, labels = batch.ids.clone(), batch.labels.clone()
    ids[row, t] = labels[row, t] = (ids[row, t] + 1) % VOCAB
    before, after = (
        gradients(Scene(batches, scene.z, scene.z0, scene.h, scene.h0).loss(objective), scene.leaves)["z", split]
        for batches in (scene.batches, scene.batches | {split: Batch(ids, labels, batch.mask)})
    )
    changed = (before - after).abs().sum(-1) > 1e-12
    assert changed.any()
    if objective.kind in BY_TOKEN:
        assert changed.nonzero().tolist() == [[row, t - 1]]
    else:
        assert changed.any(-1).nonzero().tolist() == [[row]]


@each(EVERY)
def test_labels_matter_where_they_are_read_and_nowhere_else(objective, scene):
    generator = torch.Generator().manual_seed(1)
    other = {s: torch.randint(VOCAB, b.ids.shape, generator=generator) for s, b in scene.batches.items()}
    batches = {s: Batch(other[s], other[s].where(b.labels >= 0, -100), b.mask) for s, b in scene.batches.items()}
    loss = Scene(batches, scene.z, scene.z0, scene.h, scene.h0).loss(objective)
    if objective.kind in BLIND:
        assert torch.equal(loss, scene.loss(objective))
    else:
        assert not torch.isclose(loss, scene.loss(objective))


def nothing_in(scene: Scene, row: int, *, seen: bool) -> Scene:
    """One sequence without labels in every split; unless ``seen`` it is all padding, and nothing is known of it."""
    batches, rows = {}, len(scene.z["forget"])
    for split, b in scene.batches.items():
        labels, mask = b.labels.clone(), b.mask.clone()
        labels[row] = -100
        mask[row] &= seen
        batches[split] = Batch(b.ids, labels, mask)
    gone = (torch.arange(rows) == row)[:, None, None] & (not seen)
    return scene.map(lambda x: torch.where(gone, math.nan, x), batches)


@each([o for o in MASKED if not {read.where for read in o.reads(NO_MODEL)} & {"content", "real"}])
def test_a_sequence_without_labels_changes_nothing(objective, scene):
    assert_leaves_out(objective, scene, nothing_in(scene, 3, seen=True))


@each(MASKED)
def test_a_sequence_of_padding_alone_changes_nothing(objective, scene):
    assert_leaves_out(objective, scene, nothing_in(scene, 3, seen=False))


def assert_leaves_out(objective, scene, empty):
    rest = scene.rows([0, 1, 2, 4, 5, 6, 7])
    torch.testing.assert_close(empty.loss(objective), rest.loss(objective))
    assert_same(gradients(empty.loss(objective), scene.leaves), gradients(rest.loss(objective), scene.leaves))


@each(MASKED)
def test_a_part_without_labels_adds_nothing_but_can_be_differentiated(objective, scene):
    empty = nothing_in(scene.rows([0]), 0, seen=False)
    whole = {s: [scene.batches[s], empty.batches[s]] for s in SPLITS}
    loss = empty.loss(objective, whole=whole)
    assert loss == 0
    assert all(not g.any() for g in gradients(loss, scene.leaves).values())


@each(MASKED)
def test_a_step_without_anything_to_read_raises(objective, scene):
    with pytest.raises(EmptyData, match="has a token to read"):
        nothing_in(scene.rows([0]), 0, seen=False).loss(objective)


@each(EVERY)
@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_extreme_logits_stay_finite(objective, scene, size):
    extreme = scene.map(lambda x: (x.detach().sign() * size).float().requires_grad_())
    loss = extreme.loss(objective)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, extreme.leaves).values())


@each(EVERY)
def test_bfloat16_logits_count_as_what_they_are(objective, scene):
    short = scene.map(lambda x: x.detach().bfloat16().requires_grad_())
    long = scene.map(lambda x: x.detach().bfloat16().float().requires_grad_())
    assert short.loss(objective).dtype == torch.float32
    assert torch.equal(short.loss(objective), long.loss(objective))
    expected = {k: g.bfloat16() for k, g in gradients(long.loss(objective), long.leaves).items()}
    assert_same(gradients(short.loss(objective), short.leaves), expected, rtol=0.01, atol=1e-6)


@each([DPO(), DPO(preferred="alternate"), AnswerPreservation()])
def test_pairs_of_unequal_number_are_refused(objective, scene):
    split = objective.reads(NO_MODEL)[0].split
    batches = scene.batches | {split: make_batch((1, 2))}
    step = Step(NO_MODEL, batches, scene.step(objective).reads, head=object())
    with pytest.raises(InvalidData, match="equally many"):
        objective(step)


# Weights, targets and choices are constants: gradients are those of the loss with these held fixed.


def token_nll(scene: Scene, z: torch.Tensor, split: str = "forget") -> torch.Tensor:
    batch = scene.batches[split]
    labels = F.pad(batch.ids[:, 1:], (0, 1))
    return -z.log_softmax(-1).gather(-1, labels[..., None])[..., 0][batch.positions()]


def weighted(weigh):
    """Of a token loss: the weights, from c and c^0 at the point, stay."""

    def freeze(scene):
        c, c0 = (token_nll(scene, z["forget"]).detach() for z in (scene.z, scene.z0))
        w = weigh(c, c0, scene)
        return lambda z: -(w * token_nll(scene, z)).sum() / len(c)

    return freeze


def aimed(aim):
    """Of a cross-entropy: the target, from logits at the point, stays."""

    def freeze(scene):
        batch = scene.batches["forget"]
        onehot = F.one_hot(F.pad(batch.ids[:, 1:], (0, 1)), VOCAB).double()
        t = aim(scene.z["forget"].detach(), scene.z0["forget"], onehot)
        use = batch.positions()
        return lambda z: -(t * z.log_softmax(-1)).sum(-1)[use].mean()

    return freeze


def half(c, c0, scene):
    owner, kept = scene.batches["forget"].positions().nonzero()[:, 0], torch.zeros_like(c)
    for i in owner.unique():
        own = (owner == i).nonzero()[:, 0]
        kept[own[c[own].argsort()[: max(len(own) // 2, 1)]]] = 1
    return kept * len(c) / kept.sum()


FROZEN = [
    (WGA(beta=2), weighted(lambda c, c0, _: (-2 * c).exp())),
    (SatImp(beta1=2, beta2=1.5), weighted(lambda c, c0, _: (-2 * c).exp() * (1 - (-c).exp()) ** 1.5)),
    (TNPO(beta=2), weighted(lambda c, c0, _: 2 * (-2 * c).exp() / ((-2 * c).exp() + (-2 * c0).exp()))),
    (WTNPO(beta=2, a=0.5), weighted(lambda c, c0, _: 2 * (-2.5 * c).exp() / ((-2 * c).exp() + (-2 * c0).exp()))),
    (CappedGA(keep=0.5), weighted(half)),
    (UNDIAL(beta=2), aimed(lambda z, z0, onehot: (z0 - 2 * onehot).softmax(-1))),
    (CEU(skip=0), aimed(lambda z, z0, onehot: z.masked_fill(onehot.bool(), -math.inf).softmax(-1))),
]


def slopes(fn, z: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Central differences in three directions."""
    generator, step = torch.Generator().manual_seed(0), 1e-6
    directions = [torch.randn(z.shape, generator=generator, dtype=z.dtype) for _ in range(3)]
    with torch.no_grad():
        return [(float(fn(z + step * d) - fn(z - step * d)) / (2 * step), d) for d in directions]


@pytest.mark.parametrize(("objective", "freeze"), FROZEN, ids=[o.kind for o, _ in FROZEN])
def test_weights_targets_and_choices_are_held_fixed(objective, freeze, scene):
    frozen, z = freeze(scene), scene.z["forget"]
    torch.testing.assert_close(frozen(z), scene.loss(objective))
    gradient = gradients(scene.loss(objective), {0: z})[0]
    for slope, direction in slopes(frozen, z.detach()):
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@each([o for o in OURS if o.kind not in {frozen.kind for frozen, _ in FROZEN}])
def test_of_the_others_the_gradient_is_that_of_the_loss(objective, scene):
    for what, split in {("h" if r.what == SITE else "z", r.split) for r in objective.reads(NO_MODEL)}:
        leaf = getattr(scene, what)[split]

        def moved(x, what=what, split=split):
            own = {n: dict(getattr(scene, n)) for n in ("z", "z0", "h", "h0")}
            own[what][split] = x
            return Scene(scene.batches, *own.values()).loss(objective)

        gradient = gradients(scene.loss(objective), {0: leaf})[0]
        for slope, direction in slopes(moved, leaf.detach()):
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_hinge_is_tested_with_some_sequences_on_either_side(scene):
    for objective in (o for o in OURS if isinstance(o, Hinge)):
        gradient = gradients(scene.loss(objective), scene.leaves)["z", "forget"].abs().sum((1, 2))
        assert 0 < (gradient > 0).sum() < len(gradient)
