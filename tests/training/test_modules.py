"""Modules at sites of a frozen model: only they are trained, and without them the model is its own reference."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from conftest import D_MODEL, make_hf, make_tokenizer, n_hooks
from torch import nn
from workers import tiny_scope

from concept_unlearn.errors import InvalidConfig, SiteNotFound
from concept_unlearn.lm import LM, Site
from concept_unlearn.methods import Study
from concept_unlearn.methods.descent import _Descent
from concept_unlearn.objectives import GA, RetainKL, RetainNLL
from concept_unlearn.training.modules import train_modules

SITE = Site("mlp_out", 1)


class _Scaled(_Descent):
    """x W at one site, W beginning with ``start`` times one: no identity unless it is 1."""

    kind: ClassVar[str] = "scaled"
    start: float = 0.0
    lr: float = 3e-3
    epochs: float = 3
    batch_size: int = 4

    def fit(self, study):
        raise NotImplementedError

    def _trainable(self, study):
        w = nn.Parameter(self.start * torch.eye(D_MODEL, device=study.lm.device))

        def edit(x, context):
            return torch.where(context.tokens[..., None], x + (x.float() @ w).to(x.dtype), x)

        return train_modules(study.lm, {SITE: edit}, {"w": w})


def method(**settings):
    return _Scaled(**{"objectives": (GA(), RetainNLL())} | settings)


def flags(lm):
    return [(p.requires_grad, p.grad, p.data_ptr()) for p in lm.model.parameters()]


def test_the_model_is_what_it_was_to_the_last_bit_flag_and_hook(lm):
    lm.model.model.norm.weight.requires_grad_(False)
    before, flagged = [p.clone() for p in lm.model.parameters()], flags(lm)
    deltas = method().train(Study(lm, tiny_scope()))
    assert set(deltas) == {"w"}
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))
    assert flags(lm) == flagged
    assert n_hooks(lm.model) == 0


def test_so_it_is_after_an_exception(lm):
    def stop(step):
        assert n_hooks(lm.model) > 0
        assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
        raise KeyboardInterrupt

    flagged = flags(lm)
    with pytest.raises(KeyboardInterrupt):
        method().train(Study(lm, tiny_scope()), probe=stop)
    assert n_hooks(lm.model) == 0
    assert flags(lm) == flagged


def test_the_reference_is_the_model_without_them_wherever_they_begin(lm, ids):
    seen = []
    study = Study(lm, tiny_scope())
    for start in (0.0, 0.5):
        settings = method(objectives=(GA(), RetainKL()), start=start, max_steps=1)
        settings.train(study, log=lambda _, values: seen.append(values["retain_kl"]))
    assert seen[0] == pytest.approx(0, abs=1e-6)
    assert seen[1] > 0.01
    with torch.no_grad(), method(start=0.5)._trainable(study) as trainable:
        edited = lm.logits(ids)
        with trainable.untouched():
            untouched = lm.logits(ids)
        assert torch.equal(lm.logits(ids), edited)
    assert torch.equal(lm.logits(ids), untouched)
    assert not torch.equal(edited, untouched)


def test_a_model_in_half_precision_is_trained_with_modules_in_full(lm):
    half = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="half")
    (short,), (long,) = (method().train(Study(m, tiny_scope())).values() for m in (half, lm))
    assert short.dense().dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(short.dense().flatten(), long.dense().flatten(), dim=0) > 0.9


def test_what_was_stopped_goes_on_to_the_same_change(lm, tmp_path):
    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    settings = method(checkpoint_every=2)
    whole = settings.train(Study(lm, tiny_scope()))
    with pytest.raises(KeyboardInterrupt):
        settings.train(Study(lm, tiny_scope(), folder=tmp_path), probe=stop)
    for _ in range(2):
        again = settings.train(Study(lm, tiny_scope(), folder=tmp_path))
        assert torch.equal(again["w"].dense(), whole["w"].dense())


def test_what_cannot_be_trained_is_told(lm, monkeypatch):
    w = {"w": nn.Parameter(torch.zeros(1))}
    with pytest.raises(SiteNotFound, match="layers 0 to 2"), train_modules(lm, {Site("mlp_out", 3): None}, w):
        pass
    monkeypatch.setattr("concept_unlearn.training.modules.is_sharded", lambda: True)
    with pytest.raises(InvalidConfig, match="not sharded"), train_modules(lm, {}, w):
        pass
