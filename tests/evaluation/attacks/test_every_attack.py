"""What holds of all attacks: nothing is left changed, and what they find can be kept."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from evaluation.attacks.scenes import PATCHES, asking, assert_same, patch_of, secret, state, victim_of

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import InvalidData, MissingExtra
from concept_unlearn.evaluation.attacks import (
    Attack,
    Dilute,
    LinearProbe,
    LogitLens,
    Outcome,
    Quantise,
    Relearn,
    SoftPrompt,
    attack,
    worst,
)
from concept_unlearn.evaluation.measured import Measured
from concept_unlearn.evaluation.metrics import Perplexity
from concept_unlearn.patches import Stack

SMALL = {
    "relearn": Relearn(k=4, steps=3, lr=1e-3, at=(0, 1)),
    "linear_probe": LinearProbe(stride=2, folds=3),
    "logit_lens": LogitLens(stride=1),
    "soft_prompt": SoftPrompt(n=2, k=4, steps=3),
    "dilute": Dilute(tokens=(8, 32)),
}
EVERY = [SMALL.get(kind, member()) for kind, member in Attack.members.items()]
HERE = [a for a in EVERY if a.kind != "quantise" or importlib.util.find_spec("torchao") is not None]


def each(attacks):
    return pytest.mark.parametrize("one", attacks, ids=lambda a: a.kind)


@each([*EVERY, Quantise(bits=8, group=None), Relearn(data="general", at=(1, 2))])
def test_a_spec_comes_back_equal(one):
    assert Attack.parse(one.spec()) == one


@pytest.mark.parametrize("kind", PATCHES)
@each(HERE)
def test_the_model_and_the_patch_are_as_they_were_and_the_outcome_can_be_kept(one, kind, lm, tmp_path):
    patch = patch_of(kind, lm)
    tensors = {} if patch is None else {n: t.clone() for n, t in patch.tensors().items()}
    _ = lm.fingerprint
    before = state(lm)
    outcome = one(victim_of(lm, patch, folder=tmp_path))
    assert_same(before, state(lm))
    assert all((patch.tensors()[n] == t).all() for n, t in tensors.items())
    assert outcome.results
    assert outcome.skipped is None
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome


@pytest.mark.parametrize("kind", ["dilute", "extraction", "logit_lens", "linear_probe", "relearn", "soft_prompt"])
def test_models_of_every_library_are_as_they_were(kind, any_lm):
    patch = patch_of("stack", any_lm)
    any_lm.logits(torch.arange(8, 12)[None])  # a bridge makes hooks of its own at its first pass
    _ = any_lm.fingerprint
    before = state(any_lm)
    assert SMALL.get(kind, Attack.parse(kind))(victim_of(any_lm, patch)).results
    assert_same(before, state(any_lm))


@each(HERE)
def test_the_model_is_as_it_was_after_an_exception_inside(one, lm, monkeypatch):
    patch = patch_of("stack", lm)
    before = state(lm)

    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(type(lm), "score", broken)
    monkeypatch.setattr(type(lm), "activations", broken)
    with pytest.raises(RuntimeError, match="broken"):
        one(victim_of(lm, patch))
    assert_same(before, state(lm))


@each(HERE)
def test_an_attack_finds_the_same_every_time_and_in_a_folder(one, lm, tmp_path):
    patch = patch_of("feature", lm)
    assert one(victim_of(lm, patch)) == one(victim_of(lm, patch, folder=tmp_path))


@each([a for a in HERE if a.access == "prompts"])
def test_sets_keep_their_names_order_and_indices(one, lm):
    benchmark = asking(forget=secret(6), other=secret(4, chat=False))
    victim = victim_of(lm, benchmark=benchmark)
    for way in one.ways(victim):
        assert list(way.sets) == ["forget", "other"]
        assert [len(s.examples) for s in way.sets.values()] == [6, 4]
        assert way.patch is victim.patch
        for name, asked in way.sets.items():
            for mine, own in zip(asked.examples, benchmark.sets[name].examples, strict=True):
                assert mine.chat == own.chat
                assert mine.answers[0] in own.answers[0]


@each([a for a in HERE if a.access == "prompts"])
def test_prompts_cannot_be_changed_where_there_are_none(one, lm):
    class _Silent(type(asking())):
        @property
        def leaks(self):
            return (Perplexity(on="texts"),)

    with pytest.raises(InvalidData, match="passages"):
        one(victim_of(lm, benchmark=_Silent(given={"texts": [Passage(text="w8 w9 w10")]})))


def outcome_of(value):
    return Outcome(results={} if value == "skipped" else {"forget/x": Measured(value=value)})


def test_the_worst_is_never_less_than_asking_plainly_and_another_attack_never_lowers_it():
    clean = {"forget/x": Measured(value=0.4)}
    attacks = {"a": outcome_of(0.3), "b": outcome_of(None), "c": outcome_of("skipped"), "d": outcome_of(0.9)}
    assert worst({}, clean, "forget/x") == ("clean", 0.4)
    highest = 0.4
    for n in range(len(attacks) + 1):
        some = dict(list(attacks.items())[:n])
        _, value = worst(some, clean, "forget/x")
        assert value >= highest
        highest = value
    assert worst(attacks, clean, "forget/x") == ("d", 0.9)
    assert worst({"b": outcome_of(None)}, {"forget/x": Measured(value=None)}, "forget/x") is None


def test_outcomes_are_found_again_by_all_that_decides_them(lm, tmp_path, monkeypatch):
    patch, attacks = patch_of("feature", lm), {"lens": LogitLens(stride=1), "diluted": SMALL["dilute"]}
    victim = victim_of(lm)
    given = (victim.benchmark, victim.scope)
    found = attack(lm, patch, *given, attacks, folder=tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json"]

    calls = []
    observe = type(victim.benchmark).observe
    monkeypatch.setattr(type(victim.benchmark), "observe", lambda *a, **k: calls.append(1) or observe(*a, **k))
    assert attack(lm, patch, *given, attacks, folder=tmp_path) == found
    assert not calls
    others = [
        (None, given, attacks),
        (patch.at(0.5), given, attacks),
        (patch, (asking(forget=secret(11)), given[1]), attacks),
        (patch, given, {"lens": LogitLens(stride=2), "diluted": Dilute(tokens=(16,))}),
    ]
    for other, asked, tried in others:
        calls.clear()
        attack(lm, other, *asked, tried, folder=tmp_path)
        assert calls


def test_what_cannot_be_tried_is_skipped_with_the_reason_and_tried_again(lm, tmp_path, monkeypatch):
    victim = victim_of(lm, n=4)
    attacks = {"probe": LinearProbe(folds=5), "lens": LogitLens(), "filler": Dilute(tokens=(4000,)), "bits": Quantise()}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else real(name, *a))
    found = attack(lm, patch_of("stack", lm), victim.benchmark, victim.scope, attacks, folder=tmp_path)
    assert {name for name, o in found.items() if o.skipped} == {"probe", "filler", "bits"}
    assert not any(o.results for o in found.values() if o.skipped)
    assert "5 folds" in found["probe"].skipped
    assert "256" in found["filler"].skipped
    assert "pip install torchao" in found["bits"].skipped
    assert [p.stem.split("-")[0] for p in tmp_path.glob("*.json")] == ["lens"]
    with pytest.raises(MissingExtra):
        Quantise()(victim)


def test_an_error_that_is_not_about_the_attack_is_raised(lm, monkeypatch):
    victim = victim_of(lm)
    monkeypatch.setattr(type(lm), "score", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(lm, None, victim.benchmark, victim.scope, {"lens": LogitLens()})


def test_a_change_lies_upon_the_patch(lm):
    patch = patch_of("feature", lm)
    (way,) = [w for w in LogitLens(stride=2).ways(victim_of(lm, patch)) if w.effort == 0]
    assert isinstance(way.patch, Stack)
    assert way.patch.patches[0] is patch
