"""Relearning: what comes back, on what was not relearned, whatever the patch is."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation.attacks.scenes import (
    PATCHES,
    asking,
    assert_same,
    patch_of,
    secret,
    secret_scope,
    state,
    victim_of,
)

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.errors import EmptyData
from concept_unlearn.evaluation.attacks import Relearn
from concept_unlearn.evaluation.attacks.relearn import held_out
from concept_unlearn.evaluation.metrics import Perplexity
from concept_unlearn.patches import Stack, WeightPatch
from concept_unlearn.training.loop import Loop

LOGPROB = "forget/answer_logprob"
HARD = {"k": 6, "steps": 20, "lr": 1e-2}


def clean(victim):
    benchmark = victim.benchmark
    return benchmark.measure(benchmark.observe(victim.lm, victim.patch, metrics=benchmark.leaks))


@pytest.mark.parametrize("kind", PATCHES)
def test_a_few_examples_bring_back_those_that_were_held_out(kind, lm):
    victim = victim_of(lm, patch_of(kind, lm))
    before = state(lm)
    found = Relearn(**HARD, at=(0, 5))(victim)
    assert_same(before, state(lm))
    after = found.results[LOGPROB]
    assert (after.n_total, after.notes["relearned"], after.notes["held_out"]) == (6, 6, "6 of 12")
    assert after.value > clean(victim)[LOGPROB].value + 1
    (first, at_first), (_, soon), (last, at_last) = found.curve
    assert (first, last) == (0, 20)
    assert at_first < soon < at_last == after.value


def test_the_curve_begins_with_what_leaks_before_the_first_step(lm):
    victim = victim_of(lm, patch_of("stack", lm))
    found = Relearn(**HARD, at=(0,))(victim)
    asked = {p.prompt for p in Relearn(**HARD).passages(victim.scope)}
    plain = clean(victim)[LOGPROB]
    left = [v for v, p in zip(plain.values, secret(12), strict=True) if p.prompt not in asked]
    assert found.curve[0][1] == pytest.approx(sum(left) / len(left), rel=1e-5)


def test_nothing_comes_back_where_nothing_is_learned(lm):
    victim = victim_of(lm, patch_of("feature", lm))
    found = Relearn(k=6, steps=2, lr=1e-9, at=(0,))(victim)
    assert found.results[LOGPROB].value == pytest.approx(found.curve[0][1], abs=1e-4)


@pytest.mark.parametrize("kind", PATCHES)
def test_what_is_left_is_the_patch_and_a_change_of_weights_upon_it(kind, lm):
    victim = victim_of(lm, patch_of(kind, lm))
    found = Relearn(k=6, steps=3, lr=1e-2).tampered(victim)
    change = found if victim.patch is None else found.patches[1]
    assert isinstance(change, WeightPatch)
    if victim.patch is not None:
        assert isinstance(found, Stack)
        assert found.patches[0] is victim.patch


def test_it_is_the_patched_model_that_learns(lm):
    changes = {}
    for kind in PATCHES:
        found = Relearn(k=6, steps=3, lr=1e-2).tampered(victim_of(lm, patch_of(kind, lm)))
        change = found if kind == "none" else found.patches[1]
        changes[kind] = torch.cat([t.flatten() for _, t in sorted(change.tensors().items())])
    assert not any(torch.equal(changes["none"], changes[kind]) for kind in PATCHES if kind != "none")


def test_general_text_is_none_of_what_was_forgotten(lm):
    victim = victim_of(lm)
    passages = Relearn(data="general", k=4).passages(victim.scope)
    assert set(passages) <= set(victim.scope.retain)
    found = Relearn(data="general", k=4, steps=2)(victim).results[LOGPROB]
    assert found.notes["held_out"] == "12 of 12"


def test_a_probe_that_stands_in_a_relearned_text_is_not_asked(lm):
    scope = secret_scope(12, asked=False)  # prose: question and answer in one text
    found = Relearn(k=4, steps=1)(victim_of(lm, scope=scope)).results[LOGPROB]
    assert found.n_total == 8
    reworded = [p.model_copy(update={"prompt": "w7 w8", "wordings": (p.prompt,)}) for p in secret(12)]
    found = Relearn(k=4, steps=1)(victim_of(lm, benchmark=asking(forget=reworded))).results[LOGPROB]
    assert found.n_total == 8


def test_a_leak_whose_set_is_used_up_is_left_out_and_none_at_all_is_an_error(lm):
    others = [Probe(prompt="w9 w10", answers="w20 w21", chat=True)]
    found = Relearn(k=12, steps=1)(victim_of(lm, benchmark=asking(forget=secret(12), other=others)))
    assert {name.split("/")[0] for name in found.results} == {"other"}
    with pytest.raises(EmptyData, match="all 12 examples"):
        Relearn(k=12, steps=1)(victim_of(lm))


def test_passages_are_held_out_by_their_text(lm):
    class _Texts(type(asking())):
        @property
        def leaks(self):
            return (Perplexity(on="texts"),)

    scope = secret_scope(4, asked=False)
    victim = victim_of(lm, scope=scope, benchmark=_Texts(given={"texts": [*scope.forget, Passage(text="w8 w9")]}))
    _, sets, notes = held_out(victim, scope.forget[:2])
    assert sets["texts"].examples == (*scope.forget[2:], Passage(text="w8 w9"))
    assert notes["held_out"] == "3 of 5"


@pytest.mark.parametrize("kind", ["feature", "weight"])
def test_a_relearning_that_was_stopped_goes_on_to_the_same(kind, lm, tmp_path, monkeypatch):
    patch = patch_of(kind, lm)
    attack = Relearn(k=6, steps=32, lr=1e-3, at=(4, 30))
    whole = attack(victim_of(lm, patch))
    before, take, taken = state(lm), Loop._take, []

    def stopping(self):
        if self.step == 29:
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Loop, "_take", stopping)
    with pytest.raises(KeyboardInterrupt):
        attack(victim_of(lm, patch, folder=tmp_path))
    assert_same(before, state(lm))
    assert json.loads((tmp_path / "curve.json").read_text()).keys() == {"4"}

    monkeypatch.setattr(Loop, "_take", lambda self: taken.append(self.step) or take(self))
    assert attack(victim_of(lm, patch, folder=tmp_path)) == whole
    assert taken == list(range(25, 32))


def test_two_activation_patches_do_not_share_a_training(lm, tmp_path):
    patch = patch_of("feature", lm)
    attack = Relearn(k=6, steps=3, lr=1e-2)
    alone = [attack.tampered(victim_of(lm, p)).patches[1] for p in (patch, patch.at(3.0))]
    shared = [attack.tampered(victim_of(lm, p, folder=tmp_path)).patches[1] for p in (patch, patch.at(3.0))]
    for a, b in zip(alone, shared, strict=True):
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, b.tensors()[name])
