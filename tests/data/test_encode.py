from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from concept_unlearn.data.encode import encode_answer, encode_prompt, encode_text, pad
from concept_unlearn.errors import InvalidConfig, InvalidData

CORPUS = ["The capital of France is Paris. 12 apples, (and) more!\n", "a b c d Paris London The is of: x"] * 50


def byte_level():
    """As GPT-2's: a leading space belongs to the word."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!")


def sentence_piece():
    """As Llama 2's: any text that begins a string gets a space before it."""
    inner = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = [pytest.param(byte_level(), id="byte-level"), pytest.param(sentence_piece(), id="sentence-piece")]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("answer", ["Paris", "12 apples", "(and) more", "London"])
def test_a_cloze_answer_is_what_the_text_would_hold(tokenizer, answer):
    prompt = "The capital of France is"
    joined = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
    apart = tokenizer(prompt, add_special_tokens=False)["input_ids"] + encode_answer(
        tokenizer, answer, after_space=True
    )
    assert apart == joined


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("answer", ["Paris", "12 apples", "(and) more"])
def test_a_chat_answer_has_no_space_before_it(tokenizer, answer):
    ids = encode_answer(tokenizer, answer, after_space=False)
    joined = tokenizer(f"x\n{answer}", add_special_tokens=False)["input_ids"]
    assert joined[-len(ids) :] == ids
    assert encode_answer(tokenizer, f"  {answer} ", after_space=False) == ids


def test_a_template_rendered_as_a_dictionary_or_a_list_gives_the_same_ids():
    tokenizer = make_tokenizer()
    assert encode_prompt(tokenizer, "w9 w10", chat=True) == [4, 9, 10, 5, 6]


def test_a_template_that_prints_the_date_does_not_change_from_day_to_day():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ date_string }} {{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, "w9", chat=True) == encode_prompt(tokenizer, "w9", chat=True)
    date = "{{ strftime_now('%d') if date_string is not defined else 'w7' }}"
    tokenizer.chat_template = f"{date} {{{{ messages[0]['content'] }}}}"
    assert encode_prompt(tokenizer, "w9", chat=True) == [7, 9]


def test_the_bos_of_the_tokenizer_is_kept_and_never_doubled():
    tokenizer = sentence_piece()
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = encode_prompt(tokenizer, "The capital", chat=False)
    assert ids.count(1) == 1
    assert ids[0] == 1
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, "The capital", chat=True).count(1) == 1
    assert 1 not in encode_answer(tokenizer, "Paris", after_space=True)


def test_a_passage_is_plain_or_a_reply():
    tokenizer = make_tokenizer()
    assert encode_text(tokenizer, "w9 w10") == [9, 10]
    assert encode_text(tokenizer, "w9 w10", "w11") == [4, 11, 5, 6, 9, 10]
    tokenizer.chat_template = None
    assert encode_text(tokenizer, "w9 w10", "w11") == [11, 9, 10]


def test_masks_come_from_lengths_and_ids_are_never_compared():
    ids, mask = pad([[0, 5, 0], [7]], side="left")
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert ids[0].tolist() == [0, 5, 0]
    assert pad([[5], [6, 7]], side="right").mask.tolist() == [[True, False], [True, True]]
    assert torch.equal(pad([[5]], side="left").ids, pad([[5]], side="right").ids)


@pytest.mark.parametrize("answer", ["", "   "])
def test_an_answer_of_nothing_is_refused(answer):
    with pytest.raises(InvalidData, match="has no token"):
        encode_answer(make_tokenizer(), answer, after_space=True)


def test_a_chat_prompt_needs_a_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidConfig, match="no chat template"):
        encode_prompt(tokenizer, "w9", chat=True)
