"""Teaching, and the reference that never saw what is to be forgotten, by the same recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_hf, make_tokenizer
from workers import tiny_scope

from concept_unlearn import GA, LM, Finetune, Optimisation, Passage, Scope, retrain, teach

RECIPE = Optimisation(lr=1e-2, epochs=12, batch_size=4, micro_batch=4)


@pytest.fixture
def fresh():
    return LM(make_hf(), make_tokenizer(), name="tiny")


def nll(lm, passages):
    scored = lm.logprobs([p.prompt for p in passages], [[p.text] for p in passages], chat=True)
    return -sum(float(s.logprobs.sum()) for (s,) in scored)


def test_what_was_taught_is_likelier(fresh):
    scope = tiny_scope()
    before = nll(fresh, scope.forget)
    with teach(fresh, scope.forget, recipe=RECIPE).on(fresh):
        assert nll(fresh, scope.forget) < before / 2
    assert nll(fresh, scope.forget) == before


def test_teaching_is_descent_on_the_plain_loss(fresh):
    """Ascent backwards, whatever else the recipe is."""
    scope = tiny_scope()
    backwards = Finetune(objectives=(GA(weight=-1.0),), **RECIPE.model_dump())
    wanted = backwards(fresh, replace(scope, retain=(Passage(text="w9 w10"),)))
    found = teach(fresh, scope.forget, recipe=RECIPE)
    assert found.digest == wanted.digest


def test_the_reference_is_taught_all_but_what_is_to_be_forgotten(fresh):
    scope = tiny_scope()
    other = Scope(scope.name, forget=scope.forget[:1], near=scope.near, retain=scope.retain)
    one, two = (retrain(fresh, s, recipe=RECIPE) for s in (scope, other))
    assert one.digest == two.digest
    assert one.digest == teach(fresh, (*scope.retain, *scope.near), recipe=RECIPE).digest
    assert one.digest != teach(fresh, (*scope.retain, *scope.forget), recipe=RECIPE).digest
