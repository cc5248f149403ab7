"""What is said of a feature suppressed alone is what a patch of that feature does, question by question."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONCEPT, FAR, PLANTED, make_perfect_sae, make_sae, n_hooks, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.edits import Clamp, DenseClamp, Relative, Zero
from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.evaluation.alone import effect_alone
from concept_unlearn.evaluation.question import encode_probe, encode_reply
from concept_unlearn.patches import FeaturePatch

EVEN, ODD = PLANTED
DEAD = 11


@pytest.fixture
def dictionary(planted):
    return load_dictionary(planted.first)


def logprob(lm, probe, text):
    """Of one answer, in a pass of its own."""
    prompt, ids = encode_probe(lm, probe).prompt, encode_reply(lm, probe, text)
    with torch.no_grad():
        said = lm.logits(torch.tensor([prompt + ids]))[0].log_softmax(-1)
    return sum(float(said[len(prompt) - 1 + t, i]) for t, i in enumerate(ids))


def logprobs(lm, probes):
    """Of any right answer of each."""
    rows = [torch.tensor([logprob(lm, p, text) for text in p.answers]).logsumexp(0) for p in probes]
    return torch.stack(rows).double()


def is_right(lm, probe):
    right, wrong = (
        max(logprob(lm, probe, t) / len(t.encode()) for t in texts) for texts in (probe.answers, probe.distractors)
    )
    return right > wrong


def sides(scope):
    return (*scope.in_easy, *scope.in_hard), (*scope.out_near, *scope.out_far)


@pytest.mark.parametrize("edit", [Zero(), Clamp(to=-9.0), Clamp(to=Relative(-0.7)), DenseClamp(to=-2.0)])
def test_it_is_what_a_patch_of_that_feature_does_to_each_question(planted, dictionary, edit):
    lm, scope = planted.lm, planted.scope
    found = effect_alone(lm, dictionary, scope, [EVEN, ODD, 20], edit=edit, n=1000)
    for name, probes in zip(("forget", "retain"), sides(scope), strict=True):
        before, right = logprobs(lm, probes), sum(is_right(lm, p) for p in probes)
        for feature, effect in found.items():
            with FeaturePatch(dictionary=dictionary, features=[feature], edit=edit).on(lm):
                moved = logprobs(lm, probes) - before
            change = getattr(effect, name)
            assert change.questions == len(probes)
            assert change.logprob == pytest.approx(float(moved.mean()), abs=1e-4)
            assert change.error == pytest.approx(float(moved.std()) / math.sqrt(len(probes)), abs=1e-4)
            assert change.before == pytest.approx(right / len(probes))
            assert int((moved.abs() > 1e-4).sum()) <= change.touched <= len(probes)
            assert effect.edit == edit.spec()


def test_questions_on_which_the_feature_does_not_fire_are_not_asked_again(planted, dictionary):
    rows = []
    handle = planted.lm.model.register_forward_pre_hook(
        lambda _, __, kw: rows.append(len(kw["input_ids"])), with_kwargs=True
    )
    effect_alone(planted.lm, dictionary, planted.scope, [EVEN], n=1000)
    first = sum(rows)
    effect = effect_alone(planted.lm, dictionary, planted.scope, [EVEN, ODD], n=1000)[ODD]
    handle.remove()
    asked = effect.forget.questions + effect.retain.questions
    touched = effect.forget.touched + effect.retain.touched
    assert 0 < touched < asked
    assert sum(rows) - 2 * first <= 4 * touched  # a question, and an answer and two wrong ones that go on from it


def test_a_planted_feature_alone_takes_of_the_concept_and_a_dead_one_nothing(planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    found = effect_alone(planted.lm, SAEDictionary(sae), planted.scope, [EVEN, DEAD], edit=Clamp(to=-30.0))
    assert found[EVEN].forget.touched > found[EVEN].retain.touched
    assert found[EVEN].forget.logprob < 0
    assert found[EVEN].forget.after < found[EVEN].forget.before
    for change in (found[DEAD].forget, found[DEAD].retain):
        assert (change.touched, change.logprob, change.error) == (0, 0, 0)
        assert change.after == change.before


def test_the_model_is_left_as_it_was_also_when_it_fails(planted, dictionary):
    before, ids = n_hooks(planted.lm.model), torch.tensor([[8, 40, 9]])
    said = planted.lm.logits(ids)
    effect_alone(planted.lm, dictionary, planted.scope, [EVEN])
    with pytest.raises(ZeroDivisionError):
        effect_alone(planted.lm, dictionary, planted.scope, [EVEN], progress=lambda n: 1 / 0)
    assert n_hooks(planted.lm.model) == before
    assert torch.equal(planted.lm.logits(ids), said)


def test_of_many_questions_so_many_are_asked_spread_evenly(planted, dictionary):
    effect = effect_alone(planted.lm, dictionary, planted.scope, [EVEN], n=5)[EVEN]
    assert (effect.forget.questions, effect.retain.questions) == (5, 5)


def test_without_probes_the_second_halves_of_passages_are_asked_for(planted, dictionary):
    scope = replace(planted.scope, in_easy=(), in_hard=(), out_near=(), out_far=())
    effect = effect_alone(planted.lm, dictionary, scope, [EVEN], edit=Clamp(to=-30.0))[EVEN]
    assert effect.forget.questions == len(scope.forget)
    assert effect.forget.before is effect.forget.after is None
    assert effect.retain.touched == 0
    one = Scope.of("one", forget=[words(CONCEPT[0])], retain=[words(FAR[0])], out_far=[])
    with pytest.raises(EmptyData, match="no passage of two tokens"):
        effect_alone(planted.lm, dictionary, one, [EVEN])


def test_features_that_compete_are_edited_by_the_whole_dictionary(planted):
    dictionary = SAEDictionary(make_sae("topk", k=4).to(dtype=torch.float32))
    found = effect_alone(planted.lm, dictionary, planted.scope, range(6), edit=Zero(), n=8)
    assert any(effect.forget.touched for effect in found.values())


def test_what_cannot_be_done_alone_is_said(planted, dictionary):
    with pytest.raises(InvalidConfig, match="alone a feature has no others"):
        effect_alone(planted.lm, dictionary, planted.scope, [EVEN], edit="refuse")
    with pytest.raises(InvalidConfig, match="given: 999"):
        effect_alone(planted.lm, dictionary, planted.scope, [999])
