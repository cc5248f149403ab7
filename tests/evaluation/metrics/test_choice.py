"""Multiple choice: three scores, ties, and the signs of a collapsed model."""

from __future__ import annotations

import itertools
import math

import pytest
from evaluation.metrics.planted import scored, tokens, value, view

from concept_unlearn.errors import InvalidData
from concept_unlearn.evaluation.metrics import ChoiceAccuracy

LETTERS = "ABCD"


def letters(right: str, *nll: float, order: str = LETTERS, n_end: int = 0):
    """A probe whose options are letters, with the NLL of each of A, B, C, D."""
    found = dict(zip(LETTERS, (tokens(x, *[0.0] * n_end, n_end=n_end) for x in nll), strict=True))
    wrong = [letter for letter in LETTERS if letter != right]
    return scored(
        [found[right]], [found[w] for w in wrong], answers=(right,), distractors=tuple(wrong), options=tuple(order)
    )  # fmt: skip


def test_the_likeliest_option_is_chosen():
    items = letters("B", 1.0, 0.2, 2.0, 3.0), letters("A", 1.0, 0.2, 2.0, 3.0)
    found = ChoiceAccuracy(score="letter")(view(*items))
    assert found.values == (1, 0)
    assert [found.notes[f"chosen_{i}"] for i in range(4)] == [0, 1, 0, 0]
    share = [math.exp(-x) for x in (1.0, 0.2, 2.0, 3.0)]
    assert found.notes["p_right"] == pytest.approx((share[1] + share[0]) / 2 / sum(share))
    assert found.notes["tie_rate"] == 0


@pytest.mark.parametrize("order", [*itertools.permutations(LETTERS)][::5])
def test_shuffling_options_and_scores_together_changes_nothing(order):
    item = letters("C", 1.0, 0.2, 0.1, 3.0, order="".join(order))
    found = ChoiceAccuracy(score="letter")(view(item))
    assert found.value == 1
    assert found.notes["p_right"] == pytest.approx(
        ChoiceAccuracy(score="letter")(view(letters("C", 1.0, 0.2, 0.1, 3.0))).notes["p_right"]
    )
    assert found.notes[f"chosen_{order.index('C')}"] == 1


@pytest.mark.parametrize("score", ["sum", "letter", "norm"])
def test_a_uniform_model_ties_everywhere_and_always_takes_the_first(score):
    items = [letters(right, *[1.5] * 4) for right in LETTERS]
    found = ChoiceAccuracy(score=score)(view(*items))
    assert found.value == 0.25
    assert found.notes["tie_rate"] == 1
    assert found.notes["chosen_0"] == 1
    assert found.notes["p_right"] == pytest.approx(0.25)


def test_always_answering_a_shows_in_the_histogram():
    items = [letters(right, 0.0, 5.0, 5.0, 5.0) for right in LETTERS]
    found = ChoiceAccuracy(score="letter")(view(*items))
    assert (found.value, found.notes["chosen_0"], found.notes["tie_rate"]) == (0.25, 1, 0)


def test_a_sum_favours_short_options_and_a_norm_counts_bytes():
    item = scored([tokens(1.0, 1.0)], [tokens(1.5)], answers=("größere",), distractors=("ja",))
    assert value(ChoiceAccuracy(score="sum"), item) == 0
    assert value(ChoiceAccuracy(score="norm"), item) == 1
    nearly = scored([tokens(1.75)], [tokens(2.0)], answers=("größer",), distractors=("grosser",))
    assert value(ChoiceAccuracy(), nearly) == 1  # 1.75 / 8 bytes, where 6 letters would lose to 2 / 7
    assert ChoiceAccuracy().score == "norm"


def test_an_end_token_is_no_part_of_a_letter():
    assert value(ChoiceAccuracy(score="letter"), letters("A", 0.1, 1.0, 1.0, 1.0, n_end=1)) == 1


def test_a_letter_of_several_tokens_is_refused():
    item = scored([tokens(1.0, 1.0)], [tokens(1.0)], answers=("A",), distractors=("B",))
    with pytest.raises(InvalidData, match="'A' has 2 tokens"):
        value(ChoiceAccuracy(score="letter"), item)


def test_nothing_to_choose_from_is_undefined():
    found = ChoiceAccuracy()(view(scored(tokens(1.0)), scored(tokens(1.0), tokens(2.0))))
    assert (found.n, found.n_total) == (1, 2)
    assert value(ChoiceAccuracy(), scored(tokens(1.0))) is None


def test_any_of_several_right_options_will_do():
    item = scored([tokens(3.0), tokens(0.1)], [tokens(1.0)], answers=("aa", "bb"), distractors=("cc",))
    assert value(ChoiceAccuracy(), item) == 1
