"""The same theorems where a model, padding and attention are real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCAB, make_hf, make_tokenizer
from objectives.registry import EVERY, MASKED, each
from objectives.scenes import assert_same, gradients, in_parts, make_batches, select, widen

from concept_unlearn.lm import LM
from concept_unlearn.lm.head import Head
from concept_unlearn.objectives import GA, NPO, RMU, RetainEmbedding, RetainKL, RetainNLL
from concept_unlearn.step import Batch, LiveReference, Step


def weights(lm: LM) -> dict[str, torch.nn.Parameter]:
    return dict(lm.model.named_parameters())


class Trained:
    """A model on its way, and the weights that it had."""

    def __init__(self, lm: LM) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lm, self.batches = lm, make_batches(vocab=VOCAB)
        self.before = {
            n: (p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).detach().requires_grad_()
            for n, p in weights(lm).items()
        }

    def step(self, *objectives: Any, batches: Any = None, chunk: int = 2**24, **options: Any) -> Step:
        head = Head(self.lm.model, chunk=chunk)
        return Step(
            self.lm,
            self.batches if batches is None else batches,
            [read for objective in objectives for read in objective.reads(self.lm)],
            head=head,
            reference=LiveReference(self.lm, head, lambda _: self.lm.swap(self.before)),
            **options,
        )

    def __call__(self, objective: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients."""
        loss = objective(self.step(objective, **options))
        return loss.detach(), gradients(loss, weights(self.lm))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained(LM(make_hf().double(), make_tokenizer(), name="tiny-llama"))


@each(MASKED)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2)], ids=["left", "right"])
def test_padding_changes_neither_loss_nor_gradient(objective, trained, left, right):
    wide = {s: widen(b, left, right, vocab=VOCAB) for s, b in trained.batches.items()}
    (loss, gradient), (padded_loss, padded) = trained(objective), trained(objective, batches=wide)
    torch.testing.assert_close(padded_loss, loss)
    assert_same(padded, gradient, atol=1e-9)


@each(EVERY)
def test_four_parts_of_two_are_one_of_eight(objective, trained):
    loss, gradient = trained(objective)
    parts = [{s: select(b, [i, i + 4]) for s, b in trained.batches.items()} for i in range(4)]
    losses = in_parts(
        objective,
        [lambda p=p, **options: objective(trained.step(objective, batches=p, **options)) for p in parts],
        parts,
    )
    torch.testing.assert_close(torch.stack(losses).sum().detach(), loss)
    assert_same(gradients(torch.stack(losses).sum(), weights(trained.lm)), gradient, atol=1e-9)


@each(EVERY)
def test_few_logits_at_a_time_give_the_same_gradient(objective, trained):
    (loss, gradient), (chunked_loss, chunked) = trained(objective), trained(objective, chunk=5 * VOCAB)
    torch.testing.assert_close(chunked_loss, loss)
    assert_same(chunked, gradient, atol=1e-9)


@each(EVERY)
def test_the_reference_is_left_as_it_was_and_learns_nothing(objective, trained):
    known = {n: p.detach().clone() for n, p in weights(trained.lm).items()}
    before = {n: p.detach().clone() for n, p in trained.before.items()}
    objective(trained.step(objective)).backward()
    moved = {n for n, p in weights(trained.lm).items() if p.grad is not None and p.grad.any()}
    trained.lm.model.zero_grad()
    assert moved
    assert all(p.grad is None for p in trained.before.values())
    assert all(torch.equal(p, before[n]) for n, p in trained.before.items())
    assert all(torch.equal(p, known[n]) for n, p in weights(trained.lm).items())


@each([o for o in MASKED if not any(r.where in ("content", "real") for r in o.reads(LM(make_hf())))])
def test_a_sequence_without_labels_changes_nothing(objective, trained):
    batches = {}
    for split, b in trained.batches.items():
        labels = b.labels.clone()
        labels[3] = -100
        batches[split] = Batch(b.ids, labels, b.mask)
    rest = {s: select(b, [0, 1, 2, 4, 5, 6, 7]) for s, b in batches.items()}
    (loss, gradient), (rest_loss, of_rest) = trained(objective, batches=batches), trained(objective, batches=rest)
    torch.testing.assert_close(rest_loss, loss)
    assert_same(of_rest, gradient, atol=1e-9)


def test_going_on_learning_is_the_loss_of_the_framework(trained):
    batch = trained.batches["retain"]
    labels = batch.labels.where(batch.mask, -100)
    expected = trained.lm.model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels).loss
    torch.testing.assert_close(trained(RetainNLL())[0].float(), expected.detach())


def test_only_the_chosen_weights_get_a_gradient(trained):
    model = trained.lm.model
    chosen = RMU().trains(trained.lm)
    try:
        for name, p in weights(trained.lm).items():
            p.requires_grad_(name in chosen)
        terms = [RMU(), RetainEmbedding()]
        step = trained.step(*terms)
        sum(o.weight * o(step) for o in terms).backward()
        assert {name for name, p in weights(trained.lm).items() if p.grad is not None} == set(chosen)
    finally:
        model.zero_grad()
        model.requires_grad_(True)


def test_terms_of_one_loss_share_their_passes(trained):
    terms, seen = [GA(), NPO(), RMU(), RetainKL(), RetainEmbedding()], []
    handle = trained.lm.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    try:
        step = trained.step(*terms)
        torch.stack([o(step) for o in terms]).sum().backward()
    finally:
        handle.remove()
        trained.lm.model.zero_grad()
    assert len(seen) == 2 + 3  # a pass a split, and one of the reference for each thing that is asked of it


def assert_every_kind_works(lm: LM) -> None:
    trained = Trained(lm)
    for objective in (NPO(), RetainKL(), RMU(), RetainEmbedding()):
        loss, gradient = trained(objective)
        assert loss.isfinite()
        assert loss > 0
        assert all(g.isfinite().all() for g in gradient.values())
        moved = {name for name, g in gradient.items() if g.any()}
        assert moved & set(RMU().trains(lm))


def test_they_work_on_every_architecture(any_hf):
    assert_every_kind_works(any_hf)


def test_they_work_on_every_library(any_lm):
    assert_every_kind_works(any_lm)
