"""Accuracy by reply and by rank, what a patch touches, gibberish and perplexity."""

from __future__ import annotations

import math

import pytest
from evaluation.metrics.planted import passage, replied, scored, tokens, value, view

from concept_unlearn.evaluation.measured import Measured
from concept_unlearn.evaluation.metrics import (
    AnswerLogprob,
    GeneratedAccuracy,
    Gibberish,
    Perplexity,
    RankedAccuracy,
    Touched,
)


def test_a_reply_is_right_with_an_answer_as_whole_words():
    items = replied("It is PARIS, of course", "Paris"), replied("Parisian", "Paris"), replied("x", "Rome", "X")
    assert GeneratedAccuracy()(view(*items)).values == (1, 0, 1)


def test_ranking_goes_by_the_byte_without_the_end_token_and_a_tie_is_wrong():
    ended = scored(tokens(1.0, 9.0, n_end=1), tokens(2.0), answers=("aa",), distractors=("bb",))
    tied = scored(tokens(1.0), tokens(1.0), answers=("aa",), distractors=("bb",))
    longer = scored(tokens(3.0), tokens(2.0), answers=("aaaa",), distractors=("bb",))
    assert RankedAccuracy()(view(ended, tied, longer, scored(tokens(1.0)))).values == (1, 0, 1, None)


def test_the_likeliest_answer_counts_a_token():
    item = scored([tokens(1.0, 3.0), tokens(0.5, 0.5, 9.0, n_end=1)])
    assert value(AnswerLogprob(), item) == pytest.approx(-0.5)
    assert value(AnswerLogprob(), scored(tokens())) is None


def test_what_changed_at_all_was_touched():
    before = view(scored(tokens(1.0)), scored(tokens(2.0)))
    after = view(scored(tokens(1.0)), scored(tokens(2.0 + 1e-9)))
    assert Touched()(after.beside(original=before)).values == (0, 1)
    assert Touched()(after).value is None
    assert Touched().beside == ("original",)


def test_gibberish_is_a_loop_or_unexpected():
    items = [
        (replied("a b", ids=(1, 2))[0], {**replied("a b", ids=ids)[1], "surprise": surprise})
        for ids, surprise in (((1, 2), 1.0), ((1, 2), 9.0), ((1,) * 8, 1.0), ((), None))
    ]
    found = Gibberish(on="all", sets=("forget", "other"))(view(*items, other=items[:1]))
    assert found.values == (0, 1, 1, 1, 0)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    n = 48
    texts = [passage("a", tokens(*[math.log(n)] * k)) for k in (3, 11)]
    found = Perplexity()(view(*texts))
    assert found.value == pytest.approx(n)
    assert found.notes["log_perplexity"] == pytest.approx(math.log(n))


def test_perplexity_is_of_tokens_not_of_texts():
    texts = [passage("a", tokens(4.0)), passage("b", tokens(1.0, 1.0, 1.0))]
    assert value(Perplexity(), *texts) == pytest.approx(math.exp(7 / 4))
    assert value(Perplexity(), *texts) != pytest.approx((math.exp(4) + math.exp(1)) / 2)


def test_perplexity_beyond_all_numbers_is_infinite_and_survives_a_file():
    found = Perplexity()(view(passage("a", tokens(800.0))))
    assert found.value == math.inf
    assert found.notes["log_perplexity"] == 800
    assert '"value":"Infinity"' in found.model_dump_json()
    assert Measured.model_validate_json(found.model_dump_json()).value == math.inf


def test_texts_without_a_token_have_no_perplexity():
    assert value(Perplexity(), passage("a", tokens())) is None
    assert value(Perplexity(), passage("a", tokens()), passage("b", tokens(1.0))) == pytest.approx(math.e)
