"""What an explanation says is what the patch did."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from conftest import CONCEPT, FAR, PLANTED, make_perfect_sae, n_hooks, words
from rich.console import Console

from concept_unlearn.dictionaries import direction, load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.gates import ProbeGate, SequenceGate, TokenGate
from concept_unlearn.lm.oracle import EMBEDDING
from concept_unlearn.patches import CodebookPatch, Explanation, FeaturePatch, PrefixPatch, Stack, WeightPatch, explain
from concept_unlearn.weights.delta import Dense

PROMPT = words(8, CONCEPT[0], 9, CONCEPT[1])
EVEN, ODD = PLANTED


@pytest.fixture
def patch(planted):
    return FeaturePatch(dictionary=load_dictionary(planted.first), features=PLANTED, edit=Clamp(to=-3.0))


def test_features_fire_on_their_own_words_and_those_are_moved(planted, patch):
    found = explain(patch, planted.lm, PROMPT, chat=False)
    assert [[f.feature for f in m.fired] for m in found.moments] == [[], [EVEN], [], [ODD]]
    assert [m.moved > 0 for m in found.moments] == [False, True, False, True]
    assert "".join(m.text for m in found.moments).split() == PROMPT.split()
    assert found.gates == ()
    assert {m.is_open for m in found.moments} == {None}


def test_what_comes_next_is_what_the_model_says_with_and_without_the_patch(planted, patch):
    lm = planted.lm
    found = explain(patch, lm, PROMPT, chat=False)
    ids = torch.tensor([lm.encode(PROMPT, chat=False)])
    with torch.no_grad():
        before = lm.logits(ids)[0].log_softmax(-1)
        with patch.on(lm):
            after = lm.logits(ids)[0].log_softmax(-1)
    for t, moment in enumerate(found.moments):
        expected = torch.nn.functional.kl_div(after[t], before[t], log_target=True, reduction="sum")
        assert moment.kl == pytest.approx(float(expected), abs=1e-5)
        for guesses, logprobs in ((moment.before, before[t]), (moment.after, after[t])):
            assert [g.probability for g in guesses] == pytest.approx(logprobs.topk(5).values.exp().tolist(), rel=1e-5)


def test_nothing_moves_before_the_first_edit_or_with_a_patch_that_is_off(planted, patch):
    assert explain(patch, planted.lm, PROMPT, chat=False).moments[0].kl == 0
    off = explain(patch.at(0), planted.lm, PROMPT, chat=False)
    assert [(m.moved, m.kl) for m in off.moments] == [(0, 0)] * 4
    assert [bool(m.fired) for m in off.moments] == [False, True, False, True]


def test_a_gate_is_heard_and_not_asked_anew(planted, patch):
    gate = SequenceGate(above=0.4)
    gated = FeaturePatch(slices=patch.slices, edit=patch.edit, gate=gate)
    opened = explain(gated, planted.lm, PROMPT, chat=False)
    closed = explain(gated, planted.lm, words(8, CONCEPT[0], 9, 10), chat=False)
    assert {m.is_open for m in opened.moments} == {True}
    assert {m.is_open for m in closed.moments} == {False}
    assert [(g.kind, g.statistic, g.threshold) for f in (opened, closed) for g in f.gates] == [
        ("sequence", 0.5, 0.4), ("sequence", 0.25, 0.4),
    ]  # fmt: skip
    assert closed.moments[1].fired
    assert not any(m.moved or m.kl for m in closed.moments)


def test_a_token_gate_says_so_token_by_token(planted, patch):
    gated = FeaturePatch(slices=patch.slices, edit=patch.edit, gate=TokenGate(above=0.0))
    found = explain(gated, planted.lm, PROMPT, chat=False)
    assert [m.is_open for m in found.moments] == [False, True, False, True]
    assert (found.gates[0].opened, found.gates[0].statistic) == (2, None)


def test_a_sensor_of_its_own_decides(planted, patch):
    sensor = load_dictionary(planted.first).slice([ODD])
    own = load_dictionary(planted.first).slice([EVEN])
    gated = FeaturePatch(slices=(own,), edit=patch.edit, gate=SequenceGate(above=0.1), sensor=sensor)
    closed = explain(gated, planted.lm, words(8, CONCEPT[0]), chat=False)
    assert [m.is_open for m in closed.moments] == [False, False]
    assert [f.feature for f in closed.moments[1].fired] == [EVEN]


def test_the_model_and_the_patch_are_left_as_they_were(planted, patch):
    digest, hooks = patch.digest, n_hooks(planted.lm.model)
    explain(patch, planted.lm, PROMPT)
    assert (patch.digest, n_hooks(planted.lm.model)) == (digest, hooks)


def test_banned_codes_are_seen_where_they_are_chosen(planted, codes):
    patch = CodebookPatch(codebook=load_dictionary(codes), banned=(CONCEPT[0],), error="keep")
    found = explain(patch, planted.lm, PROMPT, chat=False)
    assert [[f.feature for f in m.fired] for m in found.moments] == [[], [CONCEPT[0]], [], []]
    assert [m.moved > 0 for m in found.moments] == [False, True, False, False]


def test_a_stack_is_explained_by_its_parts(planted, patch):
    later = FeaturePatch(
        dictionary=load_dictionary(planted.second), features=[1], edit=Clamp(to=-3.0), gate=SequenceGate(above=0.9)
    )
    found = explain(Stack((patch, later)), planted.lm, PROMPT, chat=False)
    alone = explain(patch, planted.lm, PROMPT, chat=False)
    assert {f.site for m in found.moments for f in m.fired} >= {f.site for m in alone.moments for f in m.fired}
    assert [g.kind for g in found.gates] == ["sequence"]


def test_a_patch_without_features_is_seen_by_what_the_model_says(planted):
    name, weight = next((n, p) for n, p in planted.lm.model.named_parameters() if n.endswith("down_proj.weight"))
    patch = WeightPatch({name: Dense(torch.randn_like(weight))})
    found = explain(patch, planted.lm, PROMPT, chat=False)
    assert all(m.kl > 0 for m in found.moments)
    assert not any(m.fired or m.moved for m in found.moments)


def test_a_chat_model_is_asked_through_its_template(planted, patch):
    found = explain(patch, planted.lm, words(FAR[0]))
    assert [m.text.strip() for m in found.moments] == ["w4", f"w{FAR[0]}", "w5", "w6"]


def test_an_explanation_is_plain_data_with_a_table(planted, patch):
    gated = FeaturePatch(slices=patch.slices, edit=patch.edit, gate=SequenceGate(above=0.4))
    found = explain(gated, planted.lm, PROMPT, chat=False)
    assert Explanation.model_validate_json(found.model_dump_json()) == found
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    for expected in (
        "feature patch at strength 1 on tiny",
        "it read 0.5, its threshold is 0.4",
        f"w{CONCEPT[0]}",
        f"{EVEN}: ",
    ):
        assert expected in text


def test_no_guesses_are_refused(planted, patch):
    with pytest.raises(InvalidConfig, match="guesses"):
        explain(patch, planted.lm, PROMPT, guesses=0)


def test_models_of_every_library_are_explained(any_lm):
    patch = FeaturePatch(dictionary=make_perfect_sae(), features=[1], edit=Clamp(to=-3.0))
    found = explain(patch, any_lm, words(*range(8, 20)), chat=False)
    fired = [bool(m.fired) for m in found.moments]
    assert [m.moved > 0 for m in found.moments] == fired
    assert True in fired
    assert found.moments[fired.index(True)].kl > 0


def test_nothing_is_said_to_fire_on_the_token_that_opens_every_text(planted, patch):
    everything = FeaturePatch(dictionary=load_dictionary(planted.first), features=range(32), edit=Clamp(to=-3.0))
    found = explain(everything, planted.lm, f"<bos> {PROMPT}", chat=False)
    assert (found.moments[0].fired, found.moments[0].moved, found.moments[0].kl) == ((), 0, 0)
    assert all(m.fired and m.moved for m in found.moments[1:])


def test_nothing_is_said_to_fire_on_a_sink(planted, patch):
    sae = load_dictionary(planted.first)
    sae.max_norm = 1e-6
    found = explain(FeaturePatch(dictionary=sae, features=PLANTED, edit=patch.edit), planted.lm, PROMPT, chat=False)
    assert not any(m.fired or m.moved for m in found.moments)


def test_gates_of_a_stack_say_whose_they_are(planted, patch):
    gated = replace(patch, gate=TokenGate(above=0.5))
    prefix = PrefixPatch(text="w9", ids=(9,), gate=ProbeGate(above=-1.0), sensor=_nothing(planted.lm))
    shut = replace(prefix, gate=ProbeGate(above=1.0))
    found = explain(Stack((patch, Stack((gated, gated.at(0.0), gated)))), planted.lm, PROMPT, chat=False)
    assert [(g.kind, g.part) for g in found.gates] == [("token", 1), ("token", 3)]
    for one, opened in ((prefix, 4), (shut, 0)):
        (gate,) = explain(one, planted.lm, PROMPT, chat=False).gates
        assert (gate.kind, gate.part, gate.opened, gate.statistic) == ("probe", 0, opened, 0.0)


def _nothing(lm):
    return direction(EMBEDDING, torch.zeros(lm.d_model), torch.zeros(lm.d_model))


def test_tokens_that_a_prefix_puts_before_a_prompt_are_not_among_those_told_of(planted, patch):
    gated = replace(patch, gate=TokenGate(above=0.5))
    prefix = PrefixPatch(text="w9 w10", ids=(9, 10), gate=ProbeGate(above=-1.0), sensor=_nothing(planted.lm))
    alone = explain(gated, planted.lm, PROMPT, chat=False)
    for stack in (Stack((prefix, gated)), Stack((gated, prefix))):
        found = explain(stack, planted.lm, PROMPT, chat=False)
        assert [m.fired for m in found.moments] == [m.fired for m in alone.moments]
        assert [m.moved > 0 for m in found.moments] == [False, True, False, True]
        assert {g.kind: g.opened for g in found.gates} == {"token": 2, "probe": 4}
