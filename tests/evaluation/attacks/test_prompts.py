"""Attacks that ask otherwise: their words reach the model, and a gate that can be fooled by them is."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CONCEPT, PLANTED, make_hf, make_tokenizer, words
from evaluation.attacks.scenes import asking, patch_of, secret, secret_scope, victim_of

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import direction, load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.evaluation.attacks import (
    Dilute,
    Extraction,
    InContext,
    JailbreakPrefix,
    MultiTurn,
    Paraphrase,
    Prefill,
    RolePlay,
    Translate,
)
from concept_unlearn.evaluation.attacks.rewrite import written
from concept_unlearn.evaluation.question import encode_probe, encode_reply
from concept_unlearn.gates import ProbeGate, SequenceGate, StreamingGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.locate import root
from concept_unlearn.patches import FeaturePatch

LOGPROB = "forget/answer_logprob"
CHAT, PLAIN = (
    Probe(prompt="w30 w38 w31", answers="w20 w21 w24", chat=True),
    Probe(prompt="w30 w38 w31", answers="w20 w21 w24"),
)


def asked(attack, lm, *probes, scope=None, **changes):
    """The probes that are asked in place of these, by way."""
    victim = victim_of(lm, benchmark=asking(forget=probes), scope=scope or secret_scope(12), **changes)
    return [way.sets["forget"].examples for way in attack.ways(victim)]


def contains(ids, text):
    part = [int(word[1:]) for word in text.split()]
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (JailbreakPrefix(prefixes=(words(8, 9, 10), words(11, 12))), [words(8, 9, 10), words(11, 12)]),
        (RolePlay(scenes=(words(8, 9, 10),), agreement=words(13, 14)), [words(8, 9, 10)]),
        (Prefill(openings=(words(8, 9), words(10, 11))), [words(8, 9), words(10, 11)]),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_the_attacker_says_reaches_the_model(attack, said, lm, monkeypatch):
    seen = {"write": [], "score": []}
    for name, calls in seen.items():
        original = getattr(LM, name)

        def heard(self, prompts, *a, _original=original, _calls=calls, **k):
            _calls.extend(list(p) for p in prompts)
            return _original(self, prompts, *a, **k)

        monkeypatch.setattr(LM, name, heard)
    attack(victim_of(lm, benchmark=asking(forget=[CHAT, PLAIN])))
    for calls in seen.values():
        for text in said:
            assert sum(contains(ids, text) for ids in calls) == 2  # the message and the prompt that is none
        assert all(contains(ids, CHAT.prompt) for ids in calls)


def test_of_several_prefixes_the_one_that_leaks_most_is_reported_and_named(lm):
    prefixes = (words(8, 9), words(40, 41, 42), words(20, 21, 20, 21))
    each = [JailbreakPrefix(prefixes=(p,))(victim_of(lm)).results[LOGPROB] for p in prefixes]
    best = max(each, key=lambda m: m.value)
    found = JailbreakPrefix(prefixes=prefixes)(victim_of(lm)).results[LOGPROB]
    assert found == best
    assert found.notes["prefix"] == prefixes[each.index(best)]
    assert len({m.value for m in each}) == 3


def test_a_scene_is_agreed_upon_before_a_message_and_stands_before_what_is_none(lm):
    ((chat, plain),) = asked(RolePlay(scenes=("w8",), agreement="w9"), lm, CHAT, PLAIN)
    assert chat.history == ("w8", "w9")
    assert chat.prompt == CHAT.prompt
    assert plain.history == ()
    assert plain.prompt == f"w8\n\n{PLAIN.prompt}"
    behind = CHAT.model_copy(update={"history": ("w10", "w11")})
    assert asked(RolePlay(scenes=("w8",), agreement="w9"), lm, behind)[0][0].history == ("w8", "w9", "w10", "w11")


def test_in_context_examples_are_others_and_never_hold_the_answer(lm):
    passages = [Passage(text=f"w2{i % 4} w9", prompt=f"w3{i} w4{i}") for i in range(8)]
    scope = Scope("pairs", tuple(passages), retain=(Passage(text="w8 w9"),))
    probes = [Probe(prompt=p.prompt, answers=p.text, chat=chat) for p in passages for chat in (True, False)]
    (found,) = asked(InContext(k=3), lm, *probes, scope=scope)
    known = {p.prompt: p.text for p in passages}
    for probe, own in zip(found, probes, strict=True):
        shown = f"{' '.join(probe.history)} {probe.prompt.removesuffix(own.prompt)}"
        assert own.prompt not in shown
        assert not own.answered_by(shown)
        assert probe.prompt.endswith(own.prompt)
        if own.chat:
            assert len(probe.history) == 6
            assert all(known[q] == a for q, a in zip(probe.history[::2], probe.history[1::2], strict=True))
        else:
            assert sum(f"{q} {a}" in probe.prompt for q, a in known.items()) == 3
    assert len({p.history for p in found}) > 4  # drawn for each
    assert asked(InContext(k=3), lm, *probes, scope=scope) == [found]
    assert asked(InContext(k=3, seed=1), lm, *probes, scope=scope) != [found]


def test_plain_passages_are_shown_as_text(lm):
    scope = Scope("prose", tuple(Passage(text=words(30 + i, 40)) for i in range(3)), retain=(Passage(text="w8"),))
    ((chat, plain),) = asked(InContext(k=2), lm, CHAT, PLAIN, scope=scope)
    for probe in (chat, plain):
        assert probe.history == ()
        assert sum(p.text in probe.prompt for p in scope.forget) == 2
        assert probe.prompt.endswith(CHAT.prompt)


def test_where_every_passage_holds_the_answer_none_is_shown(lm):
    (way,) = InContext(k=4).ways(victim_of(lm))
    assert way.sets["forget"].examples == tuple(secret(12))
    assert way.notes["reworded"] == 0


@pytest.mark.parametrize("n", [5, 23, 60])
def test_filler_is_as_long_as_was_asked_and_comes_before_the_question(n, lm):
    ((chat, plain),) = asked(Dilute(tokens=(n,)), lm, CHAT, PLAIN)
    retained = set(" ".join(p.text for p in secret_scope(12).retain).split())
    for probe, own in ((chat, CHAT), (plain, PLAIN)):
        filler = probe.prompt.removesuffix(own.prompt).split()
        assert len(filler) == n
        assert set(filler) <= retained
        assert len(encode_probe(lm, probe).prompt) == len(encode_probe(lm, own).prompt) + n
    assert chat.prompt != plain.prompt  # each begins with another text


def test_filler_that_does_not_fit_is_left_out_of_the_curve(lm):
    found = Dilute(tokens=(8, 16, 4000))(victim_of(lm))
    assert [n for n, _ in found.curve] == [8, 16]
    assert found.results[LOGPROB].value == max(value for _, value in found.curve)


def gated(planted, gate, sensor=None):
    dictionary = load_dictionary(planted.first)
    return FeaturePatch(dictionary=dictionary, features=PLANTED, edit=Clamp(to=-50.0), gate=gate, sensor=sensor)


CONCEPT_PROBES = [
    Probe(prompt=words(CONCEPT[i], CONCEPT[i + 1], CONCEPT[i + 2]), answers=words(9 + i), chat=chat)
    for i in range(4)
    for chat in (True, False)
]


@pytest.mark.parametrize(
    ("gate", "fooled"),
    [
        (SequenceGate(above=0.3), True),
        (StreamingGate(above=1.0), False),
        (ProbeGate(above=0.0, pool="mean"), True),
        (ProbeGate(above=0.0, pool="max"), False),
    ],
    ids=["sequence", "streaming", "mean probe", "max probe"],
)
def test_dilution_fools_a_gate_that_looks_at_a_share_and_no_other(gate, fooled, planted):
    benchmark = asking(forget=CONCEPT_PROBES)
    sensor = planted_sensor(planted) if isinstance(gate, ProbeGate) else None
    patch = gated(planted, gate, sensor)

    def leaks(patch, attack=None):
        victim = victim_of(planted.lm, patch, benchmark=benchmark, scope=planted.scope)
        if attack is None:
            return benchmark.measure(benchmark.observe(planted.lm, patch, metrics=benchmark.leaks))[LOGPROB].values
        return attack(victim).results[LOGPROB].values

    assert all(a != b for a, b in zip(leaks(patch), leaks(None), strict=True))
    diluted, untouched = leaks(patch, Dilute(tokens=(100,))), leaks(None, Dilute(tokens=(100,)))
    if fooled:
        assert diluted == untouched
    else:
        assert all(a != b for a, b in zip(diluted, untouched, strict=True))


def planted_sensor(planted):
    """A direction along which the first words of the concept are far above 0, and all others below."""
    weight = torch.zeros(planted.lm.d_model)
    weight[list(PLANTED)] = 10.0
    return direction(Site("resid_pre", 0), weight, weight / weight.norm(), bias=-1.0)


def test_turns_hold_the_whole_question_in_order(lm):
    probe = Probe(prompt=words(*range(30, 37)), answers="w20", chat=True)
    plain = probe.model_copy(update={"chat": False})
    ((chat, text),) = asked(MultiTurn(turns=3), lm, probe, plain)
    said = " ".join((*chat.history[::2], chat.prompt))
    assert [w for w in said.split() if w.startswith("w3")] == probe.prompt.split()
    assert len(chat.history) == 4
    assert all(probe.prompt not in turn for turn in (*chat.history, chat.prompt))
    assert text.history == ()
    assert [w for w in text.prompt.split() if w.startswith("w3")] == probe.prompt.split()
    assert text.prompt.endswith(words(34, 35, 36))
    short = Probe(prompt="w30 w31", answers="w20", chat=True)
    ((two, one),) = asked(MultiTurn(turns=5), lm, short, short.model_copy(update={"prompt": "w30"}))
    assert len(two.history) == 2
    assert one.prompt == "w30"
    assert one.history == ()


# Replies begun for the model.


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("settings", [{"share": 0.5}, {"share": 0.25}, {"words": 3}, {"words": 99}])
def test_the_rest_of_the_answer_follows_its_beginning_exactly(settings, chat, lm):
    probe = Probe(prompt="w30", answers=(words(*range(10, 18)), "w9"), chat=chat, distractors=(words(*range(20, 28)),))
    ((begun,),) = asked(Extraction(**settings), lm, probe)
    n = {0.5: 4, 0.25: 2, 3: 3, 99: 7}[next(iter(settings.values()))]
    assert begun.opening == words(*range(10, 10 + n))
    assert begun.answers == (words(*range(10 + n, 18)),)
    assert begun.distractors == (words(*range(20 + n, 28)),)
    whole = encode_probe(lm, begun).prompt + encode_reply(lm, begun, begun.answers[0])
    assert whole == encode_probe(lm, probe).prompt + encode_reply(lm, probe, probe.answers[0])


def test_the_probability_of_the_rest_is_what_the_whole_answer_gives_it(lm):
    probe = Probe(prompt="w30 w31", answers="w10 w11 w12 w13", chat=True)
    benchmark = asking(forget=[probe])
    whole = benchmark.observe(lm, metrics=benchmark.leaks)["forget"].answers[0][0].body.logprobs
    rest = Extraction(share=0.5)(victim_of(lm, benchmark=benchmark)).results[LOGPROB].value
    assert rest == pytest.approx(sum(whole[2:]) / 2, rel=1e-5)


def test_what_cannot_be_begun_is_asked_as_it_was_and_counted(lm):
    one_word = Probe(prompt="w30", answers="w10", distractors="w11 w12")
    listed = Probe(prompt="w31", answers="w10 w11", distractors="w12 w13", options=("w12 w13", "w10 w11"))
    begun = Probe(prompt="w32", answers="w10 w11", chat=True)
    victim = victim_of(lm, benchmark=asking(forget=[one_word, listed, begun]))
    (way,) = Extraction().ways(victim)
    assert way.sets["forget"].examples[:2] == (one_word, listed)
    assert way.notes["reworded"] == 1


# Other words.


def test_a_probes_own_wording_is_asked_without_a_model(lm, monkeypatch):
    monkeypatch.setattr(LM, "generate", lambda *_, **__: 1 / 0)
    probe = Probe(prompt="w30", answers="w20", wordings=("w31 w32", "w33"), chat=True)
    assert asked(Paraphrase(), lm, probe)[0][0].prompt == "w31 w32"


def writer(replies, heard=None):
    """A model that answers in turn."""

    def generate(self, prompts, **_):
        if heard is not None:
            heard.extend(prompts)
        return [next(replies) for _ in prompts]

    return generate


def test_what_a_model_writes_is_cleaned_and_kept_if_it_gives_nothing_away(lm, monkeypatch):
    probes = [Probe(prompt=f"w3{i}", answers="w20 w21", chat=i < 4) for i in range(5)]
    said = ['\n "w40 w41?" \nmore', "Rewritten question: w42", "It is w20 w21.", "  ", "Unfinished text: w43"]
    heard = []
    monkeypatch.setattr(LM, "generate", writer(iter(said), heard))
    (found,) = asked(Paraphrase(), lm, *probes)
    assert [p.prompt for p in found] == ["w40 w41?", "w42", "w32", "w33", "w43"]
    assert all(p.prompt in order for p, order in zip(probes, heard, strict=True))
    assert "question" in heard[0]
    assert "unfinished text" in heard[4]


def test_translations_ask_for_a_reply_in_the_language_of_the_answers(lm, monkeypatch):
    monkeypatch.setattr(LM, "generate", writer(iter(["w40", "w41", "German question: w42", '"w43"'])))
    ways = asked(Translate(languages=("French", "German")), lm, CHAT, PLAIN)
    assert [[p.prompt for p in way] for way in ways] == [
        ["w40\n\nReply in English.", "w41"],
        ["w42\n\nReply in English.", "w43"],
    ]


def test_rewritings_are_kept_for_every_patch_and_survive_a_kill(lm, tmp_path, monkeypatch):
    orders, heard = [f"w{i}" for i in range(30, 46)] + ["w7"], []
    said = (f"w{i}" for i in range(100))
    monkeypatch.setattr(LM, "generate", writer(said, heard))
    victim = victim_of(lm, shared=tmp_path, folder=tmp_path / "own")
    first = written(victim, None, orders[:4])
    (path,) = tmp_path.glob("written-*.jsonl")
    assert dict(map(json.loads, path.read_text().splitlines())) == first
    with path.open("a") as file:
        file.write('["w34", "w')  # killed here
    second = written(victim_of(lm, patch_of("feature", lm), shared=tmp_path), None, orders)
    assert heard == orders
    assert {k: second[k] for k in first} == first
    other = LM(make_hf(seed=1), make_tokenizer())
    heard.clear()
    written(victim_of(other, shared=tmp_path), None, orders[:4])
    assert heard == orders[:4]


def test_the_untouched_model_writes(lm, monkeypatch):
    hooks = []
    original = LM.generate

    def generate(self, *a, **k):
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in root(self.model).modules()))
        return original(self, *a, **k)

    monkeypatch.setattr(LM, "generate", generate)
    Paraphrase()(victim_of(lm, patch_of("feature", lm)))
    assert hooks
    assert not any(hooks)
