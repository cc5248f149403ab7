"""Padding, batch order, batch size and the cache never change a result."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, words

from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.lm import LM

PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40)]
ANSWERS = [[words(7), words(9, 10)], [words(30, 31, 32)], [words(12), words(13), words(14, 15)], [words(41)]]


def test_a_batch_generates_what_its_prompts_do_alone(any_lm):
    together = any_lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert together == [any_lm.generate(p, max_new_tokens=6, chat=False)[0] for p in PROMPTS]
    assert together == any_lm.generate(PROMPTS, max_new_tokens=6, chat=False, batch_size=2)
    assert together[::-1] == any_lm.generate(PROMPTS[::-1], max_new_tokens=6, chat=False)


def test_the_cache_changes_nothing(any_lm):
    cached = any_lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert cached == any_lm.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(lm):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = lm.generate(PROMPTS, max_new_tokens=8, chat=False, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert one == lm.generate(PROMPTS, max_new_tokens=8, chat=False, temperature=1.0, seed=1)
    assert one != lm.generate(PROMPTS, max_new_tokens=8, chat=False, temperature=1.0, seed=2)


def test_a_chat_model_is_talked_to_through_its_template(lm):
    assert lm.is_chat
    assert lm.encode(words(9), chat=True) == [4, 9, 5, 6]
    assert lm.generate(words(9), max_new_tokens=3) == lm.generate("w4 w9 w5 w6", max_new_tokens=3, chat=False)
    lm.tokenizer.chat_template = None
    assert lm.generate(words(9), max_new_tokens=3) == lm.generate(words(9), max_new_tokens=3, chat=False)
    with pytest.raises(InvalidConfig, match="chat=False"):
        lm.generate(words(9), chat=True)


def brute_force(lm: LM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = lm.logits(torch.tensor([prompt + answer]))[0].float().log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_score_what_one_uncached_pass_each_gives(any_lm, batch_size):
    scored = any_lm.logprobs(PROMPTS, ANSWERS, batch_size=batch_size)
    for prompt, answers, group in zip(PROMPTS, ANSWERS, scored, strict=True):
        for answer, found in zip(answers, group, strict=True):
            ids = any_lm.encode(prompt, chat=False), [int(w[1:]) for w in answer.split()]
            torch.testing.assert_close(found.logprobs, brute_force(any_lm, *ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False}, {"temperature": 1.0}], ids=["greedy", "uncached", "drawn"]
)
def test_what_is_written_is_as_likely_as_scoring_it_says(any_lm, settings):
    prompts = [any_lm.encode(prompt, chat=False) for prompt in PROMPTS]
    written = any_lm.write(prompts, max_new_tokens=6, batch_size=2, **settings)
    assert [w.ids for w in written] == any_lm.generate_ids(prompts, max_new_tokens=6, batch_size=2, **settings)
    for prompt, (ids, logprobs) in zip(prompts, written, strict=True):
        torch.testing.assert_close(logprobs, brute_force(any_lm, prompt, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_greedy_marks_the_tokens_that_generation_would_give(lm):
    prompt = [7, 8, 9, 10]
    (written,) = lm.generate_ids([prompt], max_new_tokens=5)
    wrong = [written[0], (written[1] + 1) % VOCAB or 6, *written[2:]]
    right, off = lm.score([prompt], [[written, wrong]])[0]
    assert right.greedy.all()
    assert off.greedy[:2].tolist() == [True, False]


@torch.no_grad()
def test_each_prompt_is_read_once_for_all_its_answers(lm):
    passes = []
    handle = lm.model.register_forward_pre_hook(
        lambda _, __, k: passes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    lm.logprobs([PROMPTS[0]], [[words(7), words(9, 10), words(11, 12, 13)]])
    handle.remove()
    assert passes == [(1, 4), (3, 2)]


@torch.no_grad()
def test_texts_score_every_token_but_the_first(lm):
    texts = [[7, 8, 9], [10, 11, 12, 13, 14], [7, 8, 9]]
    scored = lm.score_texts(texts, batch_size=2)
    for ids, found in zip(texts, scored, strict=True):
        torch.testing.assert_close(found.logprobs, brute_force(lm, ids[:1], ids[1:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored[0].logprobs, scored[2].logprobs)


def test_bad_prompts_and_answers_are_named(lm):
    with pytest.raises(InvalidData, match="has no token"):
        lm.logprobs([words(7)], [[" "]])
    with pytest.raises(InvalidData, match="has no token"):
        lm.generate("", chat=False)
    with pytest.raises(InvalidData, match="tokenizer"):
        LM(lm.model).generate("w7")
