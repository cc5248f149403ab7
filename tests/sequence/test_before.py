"""The model before any request can be looked at while it is trained on top of what earlier requests left."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hf, make_tokenizer
from torch.nn.functional import kl_div, log_softmax
from workers import tiny_finetune, tiny_scope

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.lm import LM
from concept_unlearn.methods import Steer, Study
from concept_unlearn.objectives import GA, NPO, RetainEmbedding, RetainKL
from concept_unlearn.patches import Stack
from concept_unlearn.sequence.before import Before
from concept_unlearn.training.data import make_data
from concept_unlearn.training.plan import Plan

MLP = ("model.layers.[12].mlp.*",)
WAYS = {
    "full": {}, "some": {"parameters": ("model.layers.[01].*",)},
    "lora": {"adapter": {"r": 2, "target_modules": ["q_proj"]}},
    "head": {"parameters": ("lm_head.weight", "model.norm.weight")}, "all in fp32": {"precision": "fp32"},
}  # fmt: skip


@pytest.fixture
def scope():
    return tiny_scope()


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def earlier(lm, scope):
    """What two requests left: one in the weights, one in the activations, and one in some of the weights again."""
    first = tiny_finetune(lr=4e-2, max_steps=3)(lm, scope)
    second = Steer(sites=("resid_post.1",), edit={"kind": "shift", "by": -4})(lm, scope)
    return Stack((first, second, tiny_finetune(lr=4e-2, max_steps=3, parameters=MLP, seed=1)(lm, scope)))


def losses_on(lm, scope, previous, *, fixed, **settings):
    seen = []
    with Before(lm, previous) as before:
        study = Study(lm, scope, original=before.any_request if fixed else None)
        patch = tiny_finetune(**settings).fit(study, log=lambda _, values: seen.append(values))
    return patch, seen


@torch.no_grad()
def kl_by_hand(lm, scope, previous, **settings):
    """Of the untouched model's next token from that of the model as it was left, on the first step's retained rows."""
    method = tiny_finetune(**settings)
    data = make_data(lm, scope, ["forget", "retain"], method)
    batch = data.splits["retain"].batch(Plan(lm, method.objectives, data, method).items(0)["retain"], lm.device)
    own = log_softmax(lm.logits(batch.ids, batch.mask)[batch.positions()].float(), -1)
    with previous.on(lm):
        left = log_softmax(lm.logits(batch.ids, batch.mask)[batch.positions()].float(), -1)
    return float(kl_div(left, own, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_training_begins_at_the_reference_unless_that_is_the_model_before_any_request(scope, way, dtype):
    lm = LM(make_hf().to(dtype), make_tokenizer(), name="tiny")
    previous, before = earlier(lm, scope), weights(lm)
    settings = {"objectives": (GA(), RetainKL()), "micro_batch": 64, "max_steps": 1} | WAYS[way]
    _, moving = losses_on(lm, scope, previous, fixed=False, **settings)
    _, fixed = losses_on(lm, scope, previous, fixed=True, **settings)
    exact = dtype == torch.float32 or way == "all in fp32"
    assert moving[0]["retain_kl"] == pytest.approx(0, abs=1e-5 if exact else 1e-2)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    assert fixed[0]["retain_kl"] == pytest.approx(kl_by_hand(lm, scope, previous, **settings), rel=tolerance)
    assert fixed[0]["retain_kl"] > 0.1
    assert moving[0]["forget_nll"] == pytest.approx(fixed[0]["forget_nll"], rel=1e-6)
    assert all(torch.equal(before[name], w) for name, w in weights(lm).items())


@pytest.mark.parametrize("objective", [RetainEmbedding(), NPO()], ids=lambda o: o.kind)
def test_so_it_is_for_activations_and_likelihoods(lm, scope, objective):
    previous = earlier(lm, scope)
    settings = {"objectives": (objective,), "max_steps": 1}
    _, moving = losses_on(lm, scope, previous, fixed=False, **settings)
    _, fixed = losses_on(lm, scope, previous, fixed=True, **settings)
    assert abs(fixed[0][objective.kind] - moving[0][objective.kind]) > 0.01


def test_the_model_inside_is_the_untouched_one_to_the_last_bit_and_comes_back(lm, scope, ids):
    previous = earlier(lm, scope)
    with torch.no_grad():
        untouched = lm.logits(ids)
        with Before(lm, previous) as before:
            left = lm.logits(ids)
            with before.any_request():
                assert torch.equal(lm.logits(ids), untouched)
            assert torch.equal(lm.logits(ids), left)
            with pytest.raises(KeyboardInterrupt), before.any_request():
                raise KeyboardInterrupt
            assert torch.equal(lm.logits(ids), left)
        assert torch.equal(lm.logits(ids), untouched)
        assert not torch.allclose(left, untouched, atol=1e-2)


def test_a_checkpoint_made_with_another_reference_is_not_gone_on_from(lm, scope, tmp_path):
    previous = earlier(lm, scope)
    with Before(lm, previous) as before:
        tiny_finetune().fit(Study(lm, scope, folder=tmp_path))
        with pytest.raises(InvalidConfig, match="holds another finetuning"):
            tiny_finetune().fit(Study(lm, scope, folder=tmp_path, original=before.any_request))
