"""Tokens before a prompt's text: what the model says is what it would say to the longer prompt."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hooked, n_hooks

from concept_unlearn.data.encode import pad
from concept_unlearn.errors import InvalidData, NotExact, PatchNotReached
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.forward import forward, run_until_stopped

PREFIX = (40, 41, 42)
ROWS = [[7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23]]
FLAGS = torch.tensor([True, False, True])


def behind(row):
    return [*PREFIX, *row]


def longer(ids, context):
    """Chooses rows that begin with 7 or 20."""
    first = context.text.long().argmax(1, keepdim=True)
    return torch.isin(ids.gather(1, first)[:, 0], torch.tensor([7, 20]))


@torch.no_grad()
def alone(lm, row):
    return lm.logits(torch.tensor([row]))[0]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_each_row_of_a_batch_is_what_it_is_alone_behind_the_prefix(any_hf, side, keep):
    lm = any_hf
    ids, mask = pad(ROWS, side=side, device=lm.device)
    with lm.insert(PREFIX, longer):
        found = forward(lm.model, ids, mask, keep=keep).logits
    for i, row in enumerate(ROWS):
        expected = alone(lm, behind(row))[len(PREFIX) :] if FLAGS[i] else alone(lm, row)
        own = mask[i, -keep:] if keep else mask[i]
        got = found[i][own]
        at = torch.arange(ids.shape[1])[mask[i]]
        wanted = expected[at >= ids.shape[1] - keep] if keep else expected
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_written_is_what_would_be_written_behind_the_prefix(any_hf, use_cache):
    lm = any_hf
    wanted = [
        lm.generate_ids([behind(row) if flag else row], max_new_tokens=6)[0]
        for row, flag in zip(ROWS, FLAGS, strict=True)
    ]
    with lm.insert(PREFIX, longer):
        assert lm.generate_ids(ROWS, max_new_tokens=6, use_cache=use_cache) == wanted
        together = [row for row in ROWS for _ in range(2)]
        assert lm.generate_ids(together, max_new_tokens=6) == [row for row in wanted for _ in range(2)]


@torch.no_grad()
def test_beams_follow_their_prompts(lm):
    def beams(rows):
        ids, mask = pad(rows, side="left", device=lm.device)
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 2}
        return lm.model.generate(input_ids=ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :].tolist()

    wanted = [beams([behind(row) if flag else row])[0] for row, flag in zip(ROWS, FLAGS, strict=True)]
    with lm.insert(PREFIX, longer):
        found = beams(ROWS)
    for got, expected in zip(found, wanted, strict=True):
        assert got[: len(expected)] == expected


def test_answers_are_scored_behind_the_prefix(any_hf):
    lm, answers = any_hf, [[[5, 6, 7], [9]], [[5], [30, 31]], [[33, 3]]]
    wanted = [
        lm.score([behind(row) if flag else row], [group])[0]
        for row, flag, group in zip(ROWS, FLAGS, answers, strict=True)
    ]
    with lm.insert(PREFIX, longer):
        found = lm.score(ROWS, answers)
    for group, expected in zip(found, wanted, strict=True):
        for one, other in zip(group, expected, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_models_own_cache_goes_on_behind_the_prefix(lm):
    whole = alone(lm, behind([*ROWS[0], 30, 31]))[-2:]
    with lm.insert(PREFIX, longer):
        first = lm.model(input_ids=torch.tensor([ROWS[0]]))
        rest = lm.model(input_ids=torch.tensor([[30, 31]]), past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits[0], whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_where_nothing_is_chosen_not_a_bit_differs_and_nothing_stays_behind(lm):
    before, hooks = alone(lm, ROWS[1]), n_hooks(lm.model)
    with lm.insert(PREFIX, longer):
        assert torch.equal(alone(lm, ROWS[1]), before)
    changed = alone(lm, ROWS[0])
    with lm.insert(PREFIX, longer):
        assert not torch.equal(alone(lm, ROWS[0]), changed)
    with pytest.raises(RuntimeError), lm.insert(PREFIX, longer):
        lm.model(input_ids=torch.tensor([ROWS[0]]), attention_mask=torch.ones(1, 3))
    assert torch.equal(alone(lm, ROWS[0]), changed)
    assert n_hooks(lm.model) == hooks


def test_what_cannot_be_prefixed_says_so(lm, tmp_path):
    row = torch.tensor([ROWS[0]])
    with lm.insert(PREFIX, longer):
        with pytest.raises(PatchNotReached, match="give input_ids"):
            lm.model(inputs_embeds=torch.zeros(1, 2, 16))
        with pytest.raises(PatchNotReached, match="attention mask of"):
            lm.model(input_ids=row, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
        with pytest.raises(NotExact, match="leave out labels"):
            lm.model(input_ids=row, labels=row)
    hooked = LM(make_hooked(tmp_path))
    with pytest.raises(NotExact, match="given: HookedTransformer"), hooked.insert(PREFIX, longer):
        pass


@torch.no_grad()
def test_a_pass_that_was_cut_short_is_not_undone_in_the_next(lm):
    site = Site.parse("blocks.1.hook_resid_post")
    before = alone(lm, ROWS[1])
    with lm.insert(PREFIX, longer):
        with lm.stop_at(site):
            run_until_stopped(lm.model, torch.tensor([ROWS[0]]), torch.ones(1, 5, dtype=torch.bool))
        assert torch.equal(alone(lm, ROWS[1]), before)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_activations_that_are_read_are_those_of_the_prompts_own_tokens(any_hf, side):
    lm, site = any_hf, Site.parse("blocks.1.hook_resid_post")
    ids, mask = pad(ROWS, side=side, device=lm.device)

    def read(row):
        return lm.activations(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), site)[site][0]

    wanted = [read(behind(row))[len(PREFIX) :] if flag else read(row) for row, flag in zip(ROWS, FLAGS, strict=True)]
    with lm.insert(PREFIX, longer):
        stopped = lm.activations(ids, mask, site)[site]
        with lm.read(site) as seen:
            forward(lm.model, ids, mask)
    for found in (stopped, seen[site]):
        for i, row in enumerate(wanted):
            torch.testing.assert_close(found[i][mask[i]], row, rtol=1e-4, atol=1e-4)
    assert lm.activations(ids, mask, site)[site].shape == stopped.shape


@torch.no_grad()
def test_of_two_prefixes_each_leaves_out_its_own(lm):
    def every(ids, _):
        return torch.ones(len(ids), dtype=torch.bool)

    site, row, everything = Site.parse("blocks.1.hook_resid_post"), torch.tensor([ROWS[0]]), torch.ones(1, 10).bool()
    whole = torch.tensor([[*PREFIX, 44, 45, *ROWS[0]]])
    wanted = lm.logits(whole)[0, 5:], lm.activations(whole, everything, site)[site][0, 5:]
    with lm.insert(PREFIX, every), lm.insert((44, 45), every):
        found = lm.logits(row)[0], lm.activations(row, everything[:, :5], site)[site][0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_no_longer_fits_behind_its_prefix_is_refused(any_hf):
    fits = torch.full((1, 256 - len(PREFIX)), 7)
    with any_hf.insert(PREFIX, longer):
        any_hf.logits(fits)
        with pytest.raises(InvalidData, match="with its prefix a prompt has 257 tokens, and the model reads 256"):
            any_hf.logits(torch.cat([fits, fits[:, :1]], 1))
