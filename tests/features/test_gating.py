"""A fitted gate lets in what it was fitted to and keeps its promise on what it was not."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_perfect_sae, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary
from concept_unlearn.errors import EmptyData
from concept_unlearn.features.gating import _statistic, fit_gate
from concept_unlearn.gates import Always, ProbeGate, SequenceGate, Signal, StreamingGate, TokenGate
from concept_unlearn.lm import Site
from concept_unlearn.lm.context import Memory

CONCEPT, NEAR, FAR = range(36, 46), range(26, 36), range(8, 26)


def draw(ids, n, seed, length=6):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(list(ids))
    return [words(*pool[torch.randint(len(pool), (length,), generator=generator)].tolist()) for _ in range(n)]


def scope_of(seed):
    return Scope.of(
        "planted", forget=draw(CONCEPT, 60, seed), near=draw(NEAR, 40, seed + 1), retain=draw(FAR, 80, seed + 2),
        in_easy=[{"prompt": p, "answers": "w7"} for p in dict.fromkeys(draw(CONCEPT, 20, seed + 3, 4))],
        out_near=[{"prompt": p, "answers": "w7"} for p in dict.fromkeys(draw(NEAR, 20, seed + 4, 4))],
        out_far=[{"prompt": p, "answers": "w7"} for p in dict.fromkeys(draw(FAR, 20, seed + 5, 4))],
    )  # fmt: skip


@pytest.fixture
def chosen():
    return SAEDictionary(make_perfect_sae("blocks.0.hook_resid_pre")).slice([0, 3])


def opened(lm, gate, sensor, prompts):
    found = []
    for prompt in prompts:
        ids = torch.tensor([lm.encode(prompt, chat=False)])
        mask = torch.ones_like(ids, dtype=torch.bool)
        x = lm.activations(ids, mask, sensor.site)[sensor.site]
        found.append(bool(gate(Signal(sensor.encode(x).acts, mask, mask), Memory()).all()))
    return sum(found) / len(found)


def test_a_probe_gate_tells_a_concept_from_its_neighbours(lm, chosen):
    gate, sensor = fit_gate(lm, ProbeGate(alpha=0.05), chosen, scope_of(0))
    assert sensor.site == chosen.site
    assert opened(lm, gate, sensor, draw(CONCEPT, 100, 90)) > 0.9
    assert opened(lm, gate, sensor, draw(NEAR, 200, 91)) < 0.12
    assert opened(lm, gate, sensor, draw(FAR, 200, 92)) < 0.12


@pytest.mark.parametrize("gate", [SequenceGate(alpha=0.1), StreamingGate(alpha=0.1)], ids=repr)
def test_a_counting_gate_keeps_its_promise(lm, chosen, gate):
    fitted, sensor = fit_gate(lm, gate, chosen, scope_of(0))
    assert sensor is None
    for ids in (NEAR, FAR):
        assert opened(lm, fitted, chosen, draw(ids, 200, 93)) < 0.2


def test_a_smaller_alpha_asks_for_more(lm, chosen):
    strict, _ = fit_gate(lm, ProbeGate(alpha=0.01), chosen, scope_of(0))
    loose, _ = fit_gate(lm, ProbeGate(alpha=0.3), chosen, scope_of(0))
    assert strict.above > loose.above


@pytest.mark.parametrize("gate", [Always(), TokenGate(above=1.0), SequenceGate(above=0.3)], ids=repr)
def test_a_gate_with_nothing_to_fit_comes_back_as_it_is(lm, chosen, gate):
    assert fit_gate(lm, gate, chosen, scope_of(0)) == (gate, None)


@pytest.mark.parametrize(
    "gate", [SequenceGate(alpha=0.1), *(ProbeGate(pool=p) for p in ("soft", "mean", "max"))], ids=repr
)
def test_a_prompt_with_nothing_to_read_opens_no_gate(lm, chosen, gate):
    scope = scope_of(0)
    blank = SimpleNamespace(prompt=words(8), chat=False)
    empty = _statistic(gate.model_copy(update={"above": 0.0}), torch.zeros(0, 1), torch.zeros(0, dtype=torch.bool))
    assert empty == -torch.inf
    lm.chat_head = lm.encode(blank.prompt, chat=False)
    fitted, _ = fit_gate(lm, gate, chosen, replace(scope, out_far=(*scope.out_far, blank)))
    assert math.isfinite(fitted.above)


def test_one_retained_prompt_is_not_enough_for_a_probe(lm, chosen):
    scope = Scope.of("bare", forget=draw(CONCEPT, 4, 0, 16), retain=draw(FAR, 1, 2, 16), out_far=[])
    with pytest.raises(EmptyData, match="at least two retained"):
        fit_gate(lm, ProbeGate(), chosen, scope)


def test_fitting_twice_gives_the_same(lm, chosen):
    one, other = (fit_gate(lm, ProbeGate(), chosen, scope_of(0)) for _ in range(2))
    assert one.gate == other.gate
    assert torch.equal(one.sensor.W_enc, other.sensor.W_enc)


def test_forget_and_retain_text_alone_are_enough(lm, chosen):
    scope = Scope.of("bare", forget=draw(CONCEPT, 40, 0, 16), retain=draw(FAR, 60, 2, 16), out_far=[])
    gate, sensor = fit_gate(lm, ProbeGate(alpha=0.05), chosen, scope)
    assert opened(lm, gate, sensor, draw(CONCEPT, 60, 90, 8)) > 0.8
    assert sensor.site == Site("resid_pre", 0)
