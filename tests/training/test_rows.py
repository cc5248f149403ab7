"""Rows supervise the answer and its one end token, are cut loudly, and come in an order that the seed fixes."""

from __future__ import annotations

import pytest
from conftest import EOS, make_tokenizer, words

from concept_unlearn.data.encode import end_of_answer
from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import InvalidData
from concept_unlearn.step import UNSUPERVISED
from concept_unlearn.training.rows import REFUSALS, Encoder, answered, order, plain, refused

QUESTION, ANSWER = words(20, 21), words(30, 31, 32)
END = 5  # of a turn, in the tiny template
TEMPLATES = {
    "llama3": "{% for m in messages %}<a>{{ m['content'] }}<eot>{% endfor %}<b>",
    "chatml": "{% for m in messages %}<a>{{ m['content'] }}<eot>\n{% endfor %}<b>",
    "gemma": "{% for m in messages %}<a>{{ m['content'] | trim }}<eot>\n{% endfor %}<b>",
}


@pytest.fixture
def encoder():
    return Encoder(make_tokenizer(), max_length=64)


def supervised(split, row=0):
    batch = split.batch([row])
    return batch.ids[batch.labels != UNSUPERVISED].tolist()


def test_of_a_reply_the_answer_and_one_end_token_are_supervised(encoder):
    split = plain(encoder, [Passage(prompt=QUESTION, text=ANSWER)])
    assert split.rows[0].ids == (4, 20, 21, 5, 6, 30, 31, 32, END)
    assert supervised(split) == [30, 31, 32, END]


def test_of_plain_text_everything_is_supervised_that_has_something_before_it(encoder):
    split = plain(encoder, [Passage(text=ANSWER)])
    assert supervised(split) == [31, 32]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_end_token_is_the_first_thing_a_template_puts_behind_a_reply(template):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    tokenizer.chat_template = template
    assert end_of_answer(tokenizer) == tokenizer.convert_tokens_to_ids(["<eot>"])


def test_without_a_template_the_end_token_is_eos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert end_of_answer(tokenizer) == [EOS]


def test_a_long_prompt_loses_its_beginning_and_its_answer_nothing():
    encoder = Encoder(make_tokenizer(), max_length=8)
    split = plain(encoder, [Passage(prompt=words(*range(10, 20)), text=ANSWER)])
    assert split.rows[0].ids == (18, 19, 5, 6, 30, 31, 32, END)
    assert supervised(split) == [30, 31, 32, END]
    with pytest.warns(UserWarning, match="the beginning of 1 prompts and the end of 0 texts"):
        encoder.warn()


def test_a_long_answer_is_cut_loudly_and_never_to_nothing():
    encoder = Encoder(make_tokenizer(), max_length=4)
    split = plain(encoder, [Passage(prompt=QUESTION, text=words(*range(10, 20))), Passage(text=words(*range(10, 20)))])
    assert supervised(split, 0) == [10, 11, 12]
    assert len(split.rows[1].ids) == 4
    with pytest.warns(UserWarning, match="the end of 2 texts"):
        encoder.warn()


def test_padding_is_known_by_lengths_not_by_ids(encoder):
    split = plain(encoder, [Passage(text=words(10, 11)), Passage(prompt=QUESTION, text=ANSWER)])
    batch = split.batch([0, 1])
    assert batch.mask.sum(-1).tolist() == [2, 9]
    assert (batch.labels[0, 2:] == UNSUPERVISED).all()
    assert batch.rows == (0, 1)


def test_there_are_a_hundred_refusals():
    assert len(set(REFUSALS.read_text().splitlines())) == 100


def test_refusals_are_drawn_by_seed_item_and_epoch():
    passages = [Passage(prompt=words(i), text=ANSWER) for i in range(10, 40)]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(sorted({w for line in REFUSALS.read_text().splitlines() for w in line.split()}))
    one, again, other = (refused(Encoder(tokenizer, 64), passages, epochs=3, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one.rows != other.rows
    epochs = [[one.rows[one.row_of(i, e)] for i in range(30)] for e in range(4)]
    assert epochs[0] != epochs[1]
    assert epochs[3] == epochs[0]
    assert all(row.ids[1] == i for i, row in zip(range(10, 40), epochs[0], strict=True))


def test_other_answers_need_questions(encoder):
    with pytest.raises(InvalidData, match="this passage has no prompt: 'w30"):
        answered(encoder, [Passage(text=ANSWER)], [QUESTION])


def test_a_text_of_one_token_is_refused(encoder):
    with pytest.raises(InvalidData, match="a single token: 'w9'"):
        plain(encoder, [Passage(text="w9")])


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_fix():
    assert sorted(order(20, seed=3, epoch=1)) == list(range(20))
    assert order(20, seed=3, epoch=1) == order(20, seed=3, epoch=1)
    assert order(20, seed=3, epoch=1) not in (order(20, seed=3, epoch=2), order(20, seed=4, epoch=1))
