"""Negation of what was learned: exactly the lesson backwards."""

from __future__ import annotations

import pytest
import torch
from workers import tiny_finetune, tiny_scope

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.methods import Method, Negate, Study, teach
from concept_unlearn.objectives import GA

RECIPE = {"lr": 3e-3, "epochs": 3, "batch_size": 4}
LORA = {"adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}


@pytest.fixture
def scope():
    return tiny_scope()


def dense(patch):
    return {name: delta.dense() for name, delta in patch.deltas.items()}


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_it_is_the_lesson_backwards_to_the_last_bit(lm, scope, scale):
    method = Negate(**RECIPE, scale=scale)
    found, taught = dense(method(lm, scope)), dense(teach(lm, scope.forget, recipe=method.lesson))
    assert found.keys() == taught.keys()
    assert all(torch.equal(found[name], -scale * change) for name, change in taught.items())


def test_an_adapter_stays_low_rank(lm, scope):
    found = Negate(**RECIPE, **LORA)(lm, scope)
    taught = dense(tiny_finetune(objectives=(GA(weight=-1.0),), micro_batch=8, **RECIPE, **LORA)(lm, scope))
    assert {d.kind for d in found.deltas.values()} == {"low_rank"}
    assert all(torch.equal(change, -taught[name]) for name, change in dense(found).items())


def test_at_no_scale_nothing_is_left(lm, scope):
    assert not Negate(**RECIPE, scale=0)(lm, scope).deltas


def test_it_forgets_what_it_was_taught_and_never_reads_what_is_kept(lm, scope):
    """The first step of teaching once more finds the passages less likely with the patch on."""

    def nll(patch):
        seen = []
        with patch.on(lm):
            look = tiny_finetune(objectives=(GA(),), batch_size=64, max_steps=1)
            look.fit(Study(lm, scope), log=lambda _, values: seen.append(values["forget_nll"]))
        return seen[0]

    patch = Negate(**RECIPE)(lm, scope)
    assert nll(patch) > nll(patch.at(0.0)) + 0.1
    other = tiny_scope().without(scope.retain[:9])
    assert Negate(**RECIPE)(lm, other).digest == patch.digest


def test_what_was_stopped_goes_on(lm, scope, tmp_path):
    whole = Negate(**RECIPE)(lm, scope, folder=tmp_path)
    assert Negate(**RECIPE, scale=0.5)(lm, scope, folder=tmp_path).digest != whole.digest  # of the same lesson
    assert Negate(**RECIPE)(lm, scope, folder=tmp_path).digest == whole.digest


def test_a_lesson_is_not_watched_and_unknown_settings_are_named():
    with pytest.raises(InvalidConfig, match="nothing to watch or to balance"):
        Method.parse({"kind": "negate", "watch": {"keep": 0.9}})
    with pytest.raises(InvalidConfig, match="negate has no 'lamda'; known"):
        Method.parse({"kind": "negate", "lamda": 2})
