"""A soft prompt: it finds what a weak edit hides, learns on what it does not ask, and is an input like any other."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL
from evaluation.attacks.scenes import patch_of, victim_of

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import Diverged, EmptyData, InvalidData, NotExact
from concept_unlearn.evaluation.attacks import SoftPrompt
from concept_unlearn.evaluation.attacks.base import Way
from concept_unlearn.evaluation.attacks.soft_prompt import _loss
from concept_unlearn.gates import Always
from concept_unlearn.lm.oracle import EMBEDDING
from concept_unlearn.patches import PrefixPatch, PromptPatch, Stack
from concept_unlearn.patches.prompt_edits import Corruption, Vectors

LEAK = "forget/answer_logprob"


def attack(**settings):
    return SoftPrompt(**{"n": 3, "k": 6, "steps": 30, "lr": 0.5} | settings)


@pytest.mark.parametrize("kind", ["none", "feature", "weight", "stack"])
def test_answers_come_back_and_are_those_of_questions_it_was_not_taught(lm, kind):
    victim = victim_of(lm, patch_of(kind, lm))
    plain = victim.measure(Way(victim.patch), victim.leaks)
    found = attack()(victim).results[LEAK]
    assert found.value > plain[LEAK].value + 1
    assert found.notes["loss"] < found.notes["loss_before"] - 1
    assert (found.notes["relearned"], found.notes["held_out"], found.n) == (6, "6 of 12", 6)


def test_it_is_the_gradient_of_what_it_says(lm):
    """The loss is the NLL of what stands behind the prompts, and steps against its gradient lower it."""
    victim, one = victim_of(lm, patch_of("feature", lm)), attack(steps=1)
    rows = [one._row(lm, p) for p in victim.scope.forget[:4]]
    direct = []
    for row in rows:
        with torch.no_grad():
            logprobs = torch.log_softmax(lm.logits(torch.tensor([row.ids]))[0], -1)
        direct += [-float(logprobs[i - 1, row.ids[i]]) for i in range(row.n_prompt, len(row.ids))]
    with torch.no_grad():
        found = float(_loss(lm, rows))
    assert found == pytest.approx(sum(direct) / len(direct), abs=1e-4)
    first, last = (attack(steps=n, lr=0.01, k=4).learned(victim, victim.scope.forget[:4]).last for n in (1, 10))
    assert last < first


def test_it_stands_before_a_patch_that_reads_the_prompt(lm, monkeypatch):
    """A corruption of the placeholders is a corruption of the vectors too: it sees what the attacker gives."""
    seen, real = [], Corruption.__call__
    monkeypatch.setattr(
        Corruption, "__call__", lambda self, x, prompt: seen.append(x.detach()) or real(self, x, prompt)
    )
    guard = PromptPatch(edit=Corruption(sigma=0.1), gate=Always())
    victim = victim_of(lm, guard)
    found = attack(steps=2).learned(victim, victim.scope.forget[:4])
    ids = torch.tensor([attack()._row(lm, victim.scope.forget[0]).ids])
    seen.clear()
    with torch.no_grad():
        with found.patch.on(lm), lm.read(EMBEDDING) as plain:
            lm.logits(ids)
        with Stack((found.patch, guard)).on(lm):
            lm.logits(ids)
    torch.testing.assert_close(seen[0], plain[EMBEDDING])


def test_vectors_are_added_to_the_placeholders_alone(lm):
    one = attack(n=3)
    ids = torch.tensor([one._row(lm, Passage(text="w9 w10 w11", prompt=None)).ids])
    with torch.no_grad(), lm.read(EMBEDDING) as seen:
        lm.logits(ids)
        before = seen[EMBEDDING].clone()
        with PromptPatch(edit=Vectors(torch.ones(3, D_MODEL))).on(lm), lm.read(EMBEDDING) as after:
            lm.logits(ids)
    assert (after[EMBEDDING] != before).any(-1)[0].tolist() == [True] * 3 + [False] * 3


def test_it_is_the_same_each_time_and_a_seed_draws_others(lm):
    victim = victim_of(lm)
    one, same, other = (attack(steps=2, seed=seed)(victim).results[LEAK] for seed in (0, 0, 1))
    assert one == same
    assert one.value != other.value


def test_what_cannot_be_tried_is_said(lm, monkeypatch):
    with pytest.raises(EmptyData, match="take fewer"):
        attack(k=12)(victim_of(lm))
    with pytest.raises(InvalidData, match="reads 256"):
        attack(n=300)(victim_of(lm))
    with pytest.raises(InvalidData, match="within 3 tokens"):
        attack(max_tokens=3)(victim_of(lm))
    prefix = PrefixPatch(text="w40 w41", ids=(40, 41))
    with pytest.raises(NotExact, match="this patch is a prefix"):
        attack()(victim_of(lm, Stack((patch_of("feature", lm), prefix))))
    monkeypatch.setattr(f"{SoftPrompt.__module__}._loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(Diverged, match="nan at step 0: take a lower lr"):
        attack()(victim_of(lm))
