"""What weights are chosen by: gradients of the mean loss of a token, taken once, of a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hf, make_tokenizer
from workers import tiny_finetune, tiny_scope

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.lm import LM
from concept_unlearn.objectives import IDK
from concept_unlearn.step import Read, Step
from concept_unlearn.training import Mask
from concept_unlearn.training.attribution import Attribution
from concept_unlearn.training.data import make_data
from concept_unlearn.training.trainable import autocast, train_weights
from concept_unlearn.weights import (
    GradientWeightScore,
    MagnitudeWeightScore,
    RandomWeightScore,
    SnipWeightScore,
    WagleWeightScore,
    WandaWeightScore,
    shares,
)

LINEAR = ("*_proj.weight", "lm_head.weight")
EVERY = [
    GradientWeightScore(), MagnitudeWeightScore(), RandomWeightScore(), SnipWeightScore(), WagleWeightScore(),
    WandaWeightScore(),
]  # fmt: skip


@pytest.fixture
def scope():
    return tiny_scope()


def select(lm, scope, score=None, ratio=0.3, **settings):
    score = score or WagleWeightScore()
    settings = {"parameters": LINEAR if score.kind == "wanda" else None} | settings
    return tiny_finetune(mask=Mask(score=score, ratio=ratio), **settings).selected(lm, scope)


def attribute(lm, scope, ask, *, micro_batch=8, parameters=None, splits=("forget", "retain", "refusal")):
    """What ``ask(attribution)`` says."""
    data = make_data(lm, scope, splits, tiny_finetune())
    with train_weights(lm, parameters) as trainable:
        return ask(Attribution(trainable, data, trainable.head(), autocast(lm, "auto"), micro_batch))


class TestGradient:
    @pytest.mark.parametrize("micro_batch", [1, 3, 64])
    @pytest.mark.parametrize("split", ["forget", "retain"])
    def test_it_is_that_of_the_mean_over_all_tokens_whatever_the_batches(self, scope, split, micro_batch):
        lm = LM(make_hf().double(), make_tokenizer())
        batch = make_data(lm, scope, [split], tiny_finetune()).splits[split]
        batch = batch.batch(range(len(batch.rows)))
        Step(lm, {split: batch}, [Read(split)]).nll(split).mean().backward()
        want = {name: p.grad.clone() for name, p in lm.model.named_parameters()}
        found = attribute(lm, scope, lambda a: a.gradient(split), micro_batch=micro_batch)
        assert found.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-9, atol=1e-12)

    def test_a_tied_matrix_is_one_parameter(self, scope):
        lm = LM(make_hf("gpt2"), make_tokenizer())
        masks = select(lm, scope)
        assert "lm_head.weight" not in masks
        assert masks.keys() == dict(lm.model.named_parameters()).keys()

    def test_it_may_be_that_of_refusals(self, lm, scope):
        forgotten, refused = (attribute(lm, scope, lambda a, s=s: a.gradient(s)) for s in ("forget", "refusal"))
        assert not torch.allclose(forgotten["lm_head.weight"], refused["lm_head.weight"])
        mask = Mask(score=SnipWeightScore(), ratio=0.3, forget="refusal")
        assert mask.splits == ("refusal",)
        chosen = tiny_finetune(objectives=(IDK(),), mask=mask).selected(lm, scope)
        assert any(not torch.equal(m, chosen[name]) for name, m in select(lm, scope, SnipWeightScore()).items())


class TestInputs:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_they_are_the_root_mean_square_over_all_tokens_to_be_forgotten(self, scope, kind):
        lm = LM(make_hf(kind), make_tokenizer())
        name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}[kind]
        rows = make_data(lm, scope, ["forget"], tiny_finetune()).splits["forget"].rows
        seen = []
        handle = lm.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0])
        )
        with torch.no_grad():
            for row in rows:
                lm.logits(torch.tensor([row.ids]))
        handle.remove()
        want = torch.cat(seen).square().mean(0).sqrt()
        found = attribute(lm, scope, lambda a: a.inputs("forget"), parameters=[name], micro_batch=3)
        torch.testing.assert_close(found[name].flatten(), want, rtol=1e-4, atol=1e-5)
        weight = lm.model.get_parameter(name)
        assert torch.broadcast_shapes(found[name].shape, weight.shape) == weight.shape

    def test_what_is_multiplied_with_nothing_has_none(self, lm, scope):
        with pytest.raises(
            InvalidConfig, match=r"linear layers, which model\.embed_tokens\.weight and 7 others are not"
        ):
            select(lm, scope, WandaWeightScore(), parameters=None)


class TestTheChoice:
    @pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
    @pytest.mark.parametrize("ratio", [0.01, 0.37])
    def test_it_is_as_many_as_asked_for_over_all_trained_parameters(self, lm, scope, score, ratio):
        masks = select(lm, scope, score, ratio)
        n = sum(m.numel() for m in masks.values())
        assert sum(int(m.count_nonzero()) for m in masks.values()) == int(n * ratio)
        own = dict(lm.model.named_parameters())
        assert all(m.shape == own[name].shape and m.dtype == torch.bool for name, m in masks.items())

    def test_blocks_get_different_shares(self, lm, scope):
        found = shares(select(lm, scope))
        assert list(found) == ["model.embed_tokens", "0", "1", "2", "model.norm", "lm_head"]
        assert len(set(found.values())) > 3

    @pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
    def test_the_model_is_what_it_was_and_dropout_changes_nothing(self, scope, score):
        lm = LM(make_hf("gpt2"), make_tokenizer())
        settings = {"parameters": ("*c_proj.weight",)}
        want = select(lm, scope, score, **settings)
        lm.model.train()
        for p in lm.model.parameters():
            p.grad = torch.ones_like(p)
        before = [(p, p.data_ptr(), p.clone(), p.grad, p.requires_grad) for p in lm.model.parameters()]
        random = torch.random.get_rng_state()
        with torch.no_grad():
            again = select(lm, scope, score, **settings)
        assert all(torch.equal(want[name], again[name]) for name in want)
        for p, place, value, grad, flag in before:
            assert p.data_ptr() == place
            assert torch.equal(p, value)
            assert p.grad is grad
            assert (grad == 1).all()
            assert p.requires_grad == flag
        assert all(m.training for m in lm.model.modules())
        assert not any(m._forward_pre_hooks for m in lm.model.modules())
        assert torch.equal(random, torch.random.get_rng_state())

    @pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
    def test_each_split_that_it_reads_goes_through_the_model_once(self, lm, scope, score):
        rows = []
        handle = lm.model.model.register_forward_hook(lambda *x: rows.append(len(x[2].last_hidden_state)))
        select(lm, scope, score)
        handle.remove()
        sizes = {"forget": len(scope.forget), "inputs": len(scope.forget), "retain": len((*scope.near, *scope.retain))}
        assert sum(rows) == sum(sizes[source] for source in score.reads)

    def test_any_kind_of_model_can_be_asked(self, any_lm, scope):
        masks = select(any_lm, scope)
        assert masks.keys() == dict(any_lm.model.named_parameters()).keys()

    def test_half_precision_is_weighed_in_full(self, scope):
        lm = LM(make_hf().to(torch.bfloat16), make_tokenizer())
        masks = select(lm, scope)
        assert sum(int(m.count_nonzero()) for m in masks.values()) == int(lm.model.num_parameters() * 0.3)


class TestBadInput:
    def test_a_ratio_that_leaves_no_weight(self, lm, scope):
        with pytest.raises(InvalidConfig, match=r"mask\.ratio: 0\.001 of these parameters is not one weight"):
            select(lm, scope, ratio=1e-3, parameters=("model.norm.weight",))

    def test_no_mask_to_ask_for(self, lm, scope):
        with pytest.raises(InvalidConfig, match="no mask"):
            tiny_finetune().selected(lm, scope)
