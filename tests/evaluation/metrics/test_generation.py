"""ROUGE-L, token entropy, the repetition guard and consistency over wordings."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from evaluation.metrics.planted import replied, seen, value, view

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.errors import InvalidData, UnknownName
from concept_unlearn.evaluation.metrics import (
    Consistency,
    Repetitive,
    Rouge,
    TokenEntropy,
    reworded,
    rouge_l,
    token_entropy,
    wordings_of,
)
from concept_unlearn.evaluation.view import Asked, Reply, View

RECALL, F1 = Rouge(), Rouge(measure="f1")


def longest_common(a: list[str], b: list[str]) -> int:
    """By trying every subsequence."""
    found = {s for n in range(len(a) + 1) for s in itertools.combinations(a, n)}
    return max(n for n in range(len(b) + 1) for s in itertools.combinations(b, n) if s in found)


@pytest.mark.parametrize("seed", range(20))
def test_rouge_by_brute_force(seed):
    generator = random.Random(seed)
    a, b = ([generator.choice("abcd") for _ in range(generator.randint(1, 7))] for _ in range(2))
    n = longest_common(a, b)
    found = rouge_l(" ".join(a), " ".join(b))
    assert (found.recall, found.precision) == pytest.approx((n / len(a), n / len(b)))
    assert found.f1 == pytest.approx(2 * n / (len(a) + len(b)))


def test_identical_is_1_and_disjoint_0():
    for metric in (RECALL, F1):
        assert value(metric, replied("Paris it is", "Paris it is")) == pytest.approx(1)
        assert value(metric, replied("London", "Paris it is")) == 0


def test_words_are_stemmed_and_case_and_punctuation_do_not_count():
    assert value(RECALL, replied("He WRITES, plays!", "he writing played")) == 1


def test_recall_ignores_more_words_where_f1_does_not_and_the_other_is_noted():
    item = replied("the answer is Paris", "Paris")
    assert value(RECALL, item) == 1
    assert value(F1, item) == pytest.approx(0.4)
    assert RECALL(view(item)).notes == {"measure": "recall", "f1": pytest.approx(0.4)}
    assert F1(view(item)).notes == {"measure": "f1", "recall": 1.0}


def test_swapping_the_two_swaps_recall_and_precision():
    a, b = rouge_l("a b c", "a b d e"), rouge_l("a b d e", "a b c")
    assert (a.recall, a.precision) == (b.precision, b.recall)


def test_the_best_of_several_answers_counts():
    assert value(RECALL, replied("Will Shakespeare", "the bard", "William Shakespeare")) == 0.5


def test_an_empty_reply_is_0_and_an_answer_that_rouge_cannot_read_undefined():
    found = RECALL(view(replied("", "Paris"), replied("Париж", "Париж"), replied("Paris", "Париж", "Paris")))
    assert found.values == (0, None, 1)
    assert (found.value, found.n) == (0.5, 2)


def test_a_copier_scores_1_on_a_continuation():
    text = "and so the story went on until the morning came"
    assert value(Rouge(measure="f1", label="verb_mem"), replied(text, text)) == pytest.approx(1)


def test_a_black_box_is_enough():
    asked = Asked((Probe(prompt="q", answers=("Paris",)),))
    found = View.of_replies("api", {"forget": asked}, {"forget": ["Paris of course"]})
    assert RECALL(found).value == 1
    assert TokenEntropy()(found).value == pytest.approx(1)
    assert Repetitive()(found).value == 0


def test_passages_have_no_answer_to_compare_with():
    found = view(forget=[(Passage(text="a"), {"said": Reply((), "a")})])
    with pytest.raises(InvalidData, match="passages"):
        RECALL(found)


@pytest.mark.parametrize(
    ("ids", "wanted"), [((1, 2, 3, 4), 1), ((7, 7, 7), 0), ((1, 1, 2, 3), 0.75), ((), 0), ((5,), 0)]
)
def test_token_entropy_goldens(ids, wanted):
    assert token_entropy(ids) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(10))
def test_token_entropy_by_its_definition(seed):
    drawn = [random.Random(seed * 99 + i).randint(0, 5) for i in range(9)]
    shares = [n / 9 for n in Counter(drawn).values()]
    assert token_entropy(drawn) == pytest.approx(-sum(p * math.log2(p) for p in shares) / math.log2(9))


def test_token_entropy_reads_ids_and_notes_the_mean_length():
    found = TokenEntropy()(view(replied("a b", ids=(1, 1, 2, 3)), replied("c", ids=(4, 5))))
    assert found.values == pytest.approx((0.75, 1))
    assert found.notes["mean_length"] == 3


@pytest.mark.parametrize(
    ("ids", "wanted"), [((), 1), ((1, 1, 1, 1, 2), 1), ((1, 2, 3, 4) * 4, 1), ((1, 2, 3, 4, 5, 6), 0)]
)
def test_degenerate_replies_are_empty_or_one_token_or_a_loop(ids, wanted):
    assert value(Repetitive(), replied("x" if ids else "", ids=ids)) == wanted


def fact(*replies: str):
    """One probe and its other wordings, by what was replied to each."""
    items = [replied(r) for r in replies]
    probe = Probe(prompt="q", answers=("yes",), wordings=tuple(f"w{i}" for i in range(1, len(replies))))
    others = [(p, record) for p, (_, record) in zip(reworded(Asked((probe,))).examples, items[1:], strict=True)]
    return (probe, items[0][1]), others


def consistency(*facts, **settings):
    probes, others = zip(*(fact(*replies) for replies in facts), strict=True)
    sets = {"forget": list(probes), wordings_of("forget"): [item for group in others for item in group]}
    return Consistency(**settings)(view(**sets))


def test_a_constant_model_is_consistent_and_an_alternating_one_is_not():
    assert consistency(("Paris", "paris!"), ("Rome", "Rome", "Rome")).value == 1
    assert consistency(("Paris", "Rome")).value == 0


def test_agreement_is_the_mean_over_pairs_then_over_facts():
    found = consistency(("a", "a", "b"), ("a", "b"), ("a",))
    assert found.values == (pytest.approx(1 / 3), 0, None)
    assert found.value == pytest.approx(1 / 6)


def test_soft_agreement_takes_half_of_the_words():
    replies = ("the city of Paris", "it is the city Paris")
    assert consistency(replies).value == 0
    assert consistency(replies, match="soft").value == 1
    assert consistency(("Paris", "the capital of all of France is Paris"), match="soft").value == 0
    assert consistency(("Париж", "Париж"), match="soft").value == 1


@pytest.mark.parametrize("match", ["exact", "soft"])
def test_saying_nothing_throughout_is_consistent_and_flagged(match):
    found = consistency(("", " "), ("a", "a"), match=match)
    assert found.value == 1
    assert found.notes == {"match": match, "all_empty": 1}
    assert consistency(("", "a"), match=match).value == 0


def test_other_wordings_are_asked_as_probes_of_their_own():
    probes = (
        Probe(prompt="a", answers=("x",), distractors=("y",), wordings=("b", "c"), chat=True),
        Probe(prompt="d", answers=("z",)),
    )
    asked = Asked(probes, max_new_tokens=7, stop=("\n",))
    found = reworded(asked)
    assert [p.prompt for p in found.examples] == ["b", "c"]
    assert {(p.answers, p.distractors, p.chat, p.wordings) for p in found.examples} == {(("x",), ("y",), True, ())}
    assert (found.max_new_tokens, found.stop) == (7, ("\n",))


def test_consistency_refuses_a_set_that_asks_something_else():
    probe, others = fact("a", "a", "a")
    with pytest.raises(InvalidData, match="other wordings"):
        Consistency()(view(forget=[probe], forget_wordings=others[::-1]))
    with pytest.raises(UnknownName, match="forget_wordings"):
        Consistency()(view(forget=[probe]))
    assert Consistency().reads == {"forget": ("said",), "forget_wordings": ("said",)}
    assert seen([probe]).probes[0].wordings == ("w1", "w2")
