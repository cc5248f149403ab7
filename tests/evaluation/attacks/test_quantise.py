"""Rounding weights: what torchao makes of them is plain rounding to nearest, of whatever the patch left."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_hf, make_tokenizer
from evaluation.attacks.scenes import assert_same, patch_of, state, victim_of
from torch import nn

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.evaluation.attacks import Quantise
from concept_unlearn.evaluation.attacks.quantise import RoundedPatch
from concept_unlearn.lm import LM
from concept_unlearn.patches import Patch

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

LOGPROB = "forget/answer_logprob"


def rounded(weight, bits, group):
    """By hand, weight by weight."""
    found = torch.empty_like(weight)
    size = math.gcd(group, weight.shape[1])
    for i, row in enumerate(weight):
        for start in range(0, len(row), size):
            part = row[start : start + size]
            scale = max(-part.min() / 2 ** (bits - 1), part.max() / (2 ** (bits - 1) - 1))
            found[i, start : start + size] = (part / scale).round() * scale
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 8, 24, 128])
def test_linear_layers_are_rounded_to_nearest_and_nothing_else_is(bits, group, lm):
    own = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    linear = {f"{n}.weight" for n, m in lm.model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head.weight"}
    assert len(linear) == 21
    before = state(lm)
    with RoundedPatch(bits, group).on(lm):
        for name, p in lm.model.named_parameters():
            if name in linear:
                torch.testing.assert_close(p.data, rounded(own[name], bits, group or own[name].shape[1]))
                assert not torch.equal(p.data, own[name])
            else:
                assert p.data_ptr() == before["storage"][name]
    assert_same(before, state(lm))


def test_weights_that_have_a_column_an_output_are_rounded_by_output():
    lm = LM(make_hf("gpt2"), make_tokenizer())
    own = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    name = "transformer.h.0.mlp.c_fc.weight"
    with RoundedPatch(4, 8).on(lm):
        torch.testing.assert_close(lm.model.get_parameter(name).data, rounded(own[name].T, 4, 8).T)
        assert torch.equal(lm.model.transformer.wte.weight, own["transformer.wte.weight"])


def test_rounding_what_is_rounded_changes_little_and_halfway_is_half_of_it(lm):
    name = "model.layers.0.mlp.up_proj.weight"
    own = lm.model.get_parameter(name).detach().clone()
    with RoundedPatch(4, None).on(lm):
        full = lm.model.get_parameter(name).detach().clone()
    with RoundedPatch(4, None, strength=0.5).on(lm):
        torch.testing.assert_close(lm.model.get_parameter(name).data, (own + full) / 2)
    with RoundedPatch(4, None, strength=0.0).on(lm):
        assert torch.equal(lm.model.get_parameter(name), own)


def test_half_precision_stays_half_precision():
    lm = LM(make_hf().bfloat16(), make_tokenizer())
    with RoundedPatch(4, 16).on(lm):
        assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_the_patched_weights_are_rounded_and_not_the_models_own(lm):
    patch = patch_of("weight", lm)
    (name,) = patch.deltas
    with patch.on(lm):
        merged = lm.model.get_parameter(name).detach().clone()
    with Quantise(bits=4, group=8).tampered(victim_of(lm, patch)).on(lm):
        torch.testing.assert_close(lm.model.get_parameter(name).data, rounded(merged, 4, 8))


def test_a_feature_patch_works_on_the_rounded_model(lm):
    patch = patch_of("feature", lm)
    ids = torch.arange(8, 20)[None]
    with patch.on(lm), RoundedPatch(4, None).on(lm):
        want = lm.logits(ids)
    with Quantise(group=None).tampered(victim_of(lm, patch)).on(lm):
        assert torch.equal(lm.logits(ids), want)


@pytest.mark.parametrize("kind", ["none", "feature", "weight", "stack"])
def test_eight_bits_leak_nearly_what_the_weights_do_and_four_differ_more(kind, lm):
    victim = victim_of(lm, patch_of(kind, lm))
    benchmark = victim.benchmark
    own = benchmark.measure(benchmark.observe(lm, victim.patch, metrics=benchmark.leaks))[LOGPROB].values

    def distance(attack):
        found = attack(victim).results[LOGPROB].values
        return max(abs(a - b) for a, b in zip(found, own, strict=True))

    assert 0 < distance(Quantise(bits=8)) < 0.5
    assert distance(Quantise(bits=4)) > 4 * distance(Quantise(bits=8))


def test_a_model_without_linear_layers_is_refused(any_lm):
    patch = RoundedPatch(8)
    if any_lm.model.__class__.__name__ == "HookedTransformer":
        with pytest.raises(InvalidConfig, match="no linear layers"), patch.on(any_lm):
            pass
        return
    ids = torch.arange(8, 20)[None]
    want, before = any_lm.logits(ids), state(any_lm)
    with patch.on(any_lm):
        assert not torch.equal(any_lm.logits(ids), want)
    assert torch.equal(any_lm.logits(ids), want)
    assert_same(before, state(any_lm))


def test_it_comes_back_from_its_spec():
    patch = RoundedPatch(4, 64, strength=0.5)
    assert Patch.kinds["rounded"].restore(patch.spec(), {}, None) == patch
