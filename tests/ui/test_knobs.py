"""A patch as its knobs stand."""

from __future__ import annotations

import pytest
import torch
from conftest import PLANTED, make_perfect_sae

from concept_unlearn.dictionaries import as_dictionary, direction, load_dictionary
from concept_unlearn.edits import Clamp, DenseClamp, Mean, Refuse, Relative, Shift
from concept_unlearn.gates import Always, ProbeGate, SequenceGate, StreamingGate, TokenGate
from concept_unlearn.lm.oracle import EMBEDDING
from concept_unlearn.patches import CodebookPatch, FeaturePatch, PrefixPatch, Stack, WeightPatch
from concept_unlearn.ui.knobs import Knobs, gate_of, in_words, strength_span, threshold_span
from concept_unlearn.ui.muted import features_of, without
from concept_unlearn.weights.delta import Dense

SITE = "blocks.1.hook_resid_post"


def made(features=range(6), **settings):
    settings = {"edit": Clamp(to=-4.0)} | settings
    return FeaturePatch(dictionary=as_dictionary(make_perfect_sae()), features=list(features), **settings)


def says(lm, ids, patch):
    with torch.no_grad(), patch.on(lm):
        return lm.logits(ids)


def test_knobs_that_nobody_turned_are_the_patch(lm, ids):
    patch = made(strength=0.7)
    assert torch.equal(says(lm, ids, Knobs(strength=0.7).turned(patch)), says(lm, ids, patch))


def test_strength_0_is_the_model(lm, ids):
    assert torch.equal(says(lm, ids, Knobs(strength=0.0).turned(made())), says(lm, ids, Stack(())))


@pytest.mark.parametrize("edit", [Clamp(to=-4.0), DenseClamp(to=-4.0), Shift(by=-2.0), Mean(values=(0.1,) * 6)])
@pytest.mark.parametrize("gate", [Always(), TokenGate(above=0.5), SequenceGate(above=0.5)])
def test_without_features_it_is_the_patch_that_was_never_given_them(lm, ids, edit, gate):
    off = {(SITE, 1), (SITE, 4)}
    rest = Mean(values=(0.1,) * 4) if isinstance(edit, Mean) else edit
    fewer = made([0, 2, 3, 5], edit=rest, gate=gate)
    torch.testing.assert_close(
        says(lm, ids, Knobs(strength=1.0, off=off).turned(made(edit=edit, gate=gate))), says(lm, ids, fewer)
    )


def test_the_features_that_stay_on_are_moved_as_far_as_before(lm, ids):
    """An edit relative to the norm is worth ||x|| / k a feature, and k stays that of the whole patch."""
    edit = DenseClamp(to=Relative(-0.5))
    one_by_one = [without(made(edit=edit), {(SITE, j) for j in range(6) if j != i}) for i in range(6)]
    x = torch.randn(7, 16)

    def delta(patch):
        (chosen,) = patch.slices
        acts = chosen.encode(x).acts
        unit = x.norm(dim=-1, keepdim=True) / (6 * chosen.W_dec.norm(dim=-1).clamp(min=1e-12))
        return (edit(acts, unit) - acts) @ chosen.W_dec

    torch.testing.assert_close(sum(map(delta, one_by_one)), delta(made(edit=edit)))


def test_a_feature_that_is_off_triggers_no_refusal(lm, ids):
    patch = made([0, 1, 9], edit=Refuse(to=8.0))
    off = {(SITE, 0), (SITE, 1)}
    assert torch.equal(says(lm, ids, Knobs(strength=1.0, off=off).turned(patch)), says(lm, ids, Stack(())))


def test_with_every_feature_off_nothing_is_left(lm, ids):
    off = frozenset(features_of(made()))
    assert torch.equal(says(lm, ids, Knobs(strength=1.0, off=off).turned(made())), says(lm, ids, Stack(())))
    stack = Knobs(strength=1.0, off=off).turned(Stack((made(), made([9]))))
    assert torch.equal(says(lm, ids, stack), says(lm, ids, made([9])))


def test_codes_are_switched_off_by_the_ban(planted, codes):
    patch = CodebookPatch(codebook=load_dictionary(codes), banned=(36, 37), error="keep")
    assert features_of(patch) == (("blocks.0.hook_resid_pre", 36), ("blocks.0.hook_resid_pre", 37))
    assert without(patch, {("blocks.0.hook_resid_pre", 36)}).banned == (37,)


def test_a_threshold_is_of_the_part_that_it_was_turned_of(lm):
    stack = Stack((made(gate=TokenGate(above=1.0)), Stack((made(gate=SequenceGate(above=0.2)),))))
    turned = Knobs(strength=1.0, above={1: 0.4}).turned(stack)
    assert turned.patches[0].gate == TokenGate(above=1.0)
    assert turned.patches[1].patches[0].gate == SequenceGate(above=0.4)


@pytest.mark.parametrize(
    "gate", [TokenGate(above=2.0), SequenceGate(above=0.1), StreamingGate(above=3.0), ProbeGate(above=-25.0)]
)
def test_a_slider_of_a_threshold_goes_both_ways(gate):
    low, high, step = threshold_span(gate)
    assert low < gate.above < high
    assert 0 < step < (high - low) / 50


def test_a_gate_without_a_threshold_is_told_in_words(lm):
    assert threshold_span(Always()) is None
    assert "every token" in in_words(made())
    name = next(iter(dict(lm.model.named_parameters())))
    weight = WeightPatch(deltas={name: Dense(torch.zeros_like(dict(lm.model.named_parameters())[name]))})
    assert "weights" in in_words(weight)


def test_the_strength_slider_holds_the_patch_as_made():
    assert strength_span(made()).high == 2
    assert strength_span(made(strength=5.0)).high == 10


def test_the_planted_features_can_be_told_apart_by_their_site(planted):
    patch = FeaturePatch(
        dictionary=[load_dictionary(planted.first), load_dictionary(planted.second)], features=[PLANTED, PLANTED]
    )
    assert len(set(features_of(patch))) == 4


def test_a_prefix_that_is_gated_has_a_threshold_to_turn(lm):
    sensor = direction(EMBEDDING, torch.ones(lm.d_model), torch.zeros(lm.d_model))
    prefix = PrefixPatch(text="w9", ids=(9,), gate=ProbeGate(above=0.3), sensor=sensor)
    assert threshold_span(gate_of(prefix)) is not None
    assert Knobs(strength=1.0, above={0: 0.7}).turned(prefix).gate == ProbeGate(above=0.7)
    always = PrefixPatch(text="w9", ids=(9,), gate="always")
    assert always.spec()["gate"] == {"kind": "always"}
    assert "every text" in in_words(always)


def test_parts_that_are_left_keep_their_numbers():
    stack = Stack((made([0, 1]), Stack((made([2]), made([1])))))
    off = frozenset({(SITE, 0), (SITE, 1)})
    assert Knobs(strength=1.0, off=off).left(stack) == (1,)
    assert Knobs(strength=1.0).left(stack) == (0, 1, 2)
