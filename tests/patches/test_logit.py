"""Logit offsets on live models: what the formula says, token by token, however the big model's cache is handled."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import D_MODEL, VOCAB, make_hf, make_sae, make_tokenizer, n_hooks, words

from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import InvalidConfig, ModelNotFound, NotExact, PatchMismatch, PatchNotReached
from concept_unlearn.gates import SequenceGate
from concept_unlearn.lm import LM
from concept_unlearn.lm.ensemble import common_vocabulary, offset
from concept_unlearn.lm.forward import forward, new_cache
from concept_unlearn.lm.head import Head
from concept_unlearn.patches import FeaturePatch, LogitPatch, Stack, load_patch
from concept_unlearn.patches.logit import Small
from concept_unlearn.weights import Dense

PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30)]
ALPHA = 0.7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changes(model, scale=0.2):
    return {n: Dense(scale * draw(*p.shape, seed=i)) for i, (n, p) in enumerate(model.named_parameters())}


def changed(model, deltas):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta.change)
    return model


def state(*lms):
    return [(p, p.data_ptr(), p.detach().clone()) for lm in lms for p in lm.model.parameters()]


def assert_same(before):
    for parameter, pointer, value in before:
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def make_small(kind="gpt2"):
    return LM(make_hf(kind, seed=5), make_tokenizer(), name="small")


@pytest.fixture
def small(request):
    return make_small(getattr(request, "param", "gpt2"))


@pytest.fixture
def patch(small):
    return LogitPatch(changes(small.model), small, alpha=ALPHA)


@pytest.fixture
def spoken(lm, patch, small):
    """l_e by its formula, of three whole models, each row by itself."""
    trained = changed(small.model, patch.deltas)

    @torch.no_grad()
    def say(row, alpha=ALPHA):
        ids = torch.tensor([row])
        return (lm.model(ids).logits + alpha * (trained(ids).logits - small.model(ids).logits))[0]

    return say


class TestTheRule:
    def test_golden_case(self):
        big, base, trained = (torch.tensor(x, dtype=torch.float64) for x in ([2, 1, 0], [1, 0, 0], [0, 0, 1]))
        said = offset(big, trained, base, alpha=1.0, n=3).softmax(-1)
        torch.testing.assert_close(said, torch.full((3,), 1 / 3, dtype=torch.float64))

    def test_the_distribution_is_the_product_form(self):
        big, base, trained = (draw(5, 9, seed=i).double() for i in range(3))
        said = offset(big, trained, base, alpha=ALPHA, n=9).softmax(-1)
        product = big.softmax(-1) * (trained.softmax(-1) / base.softmax(-1)) ** ALPHA
        torch.testing.assert_close(said, product / product.sum(-1, keepdim=True))

    def test_a_constant_added_to_a_models_logits_leaves_the_distribution(self):
        big, base, trained = (draw(5, 9, seed=i).double() for i in range(3))
        said = offset(big, trained, base, alpha=ALPHA, n=9).softmax(-1)
        for moved in ((big + 3, trained, base), (big, trained - 5, base), (big, trained, base + 7)):
            torch.testing.assert_close(offset(*moved, alpha=ALPHA, n=9).softmax(-1), said)

    def test_equal_small_models_leave_every_bit(self):
        big, base = draw(5, 9).bfloat16(), draw(5, 9, seed=1)
        assert torch.equal(offset(big, base, base, alpha=3.0, n=9), big)

    def test_logits_beyond_the_shared_tokens_stay(self):
        big, base, trained = draw(2, 9), draw(2, 7, seed=1), draw(2, 7, seed=2)
        said = offset(big, trained, base, alpha=1.0, n=6)
        assert torch.equal(said[:, 6:], big[:, 6:])
        torch.testing.assert_close(said[:, :6], (big + torch.nn.functional.pad(trained - base, (0, 2)))[:, :6])


class TestOnAModel:
    def test_of_any_library_its_logits_are_those_of_the_rule(self, any_lm, ids, small, patch):
        trained = changed(small.model, patch.deltas)
        base, before = any_lm.logits(ids), state(any_lm, small)
        want = base + ALPHA * (trained(ids).logits - small.model(ids).logits)
        with patch.on(any_lm):
            torch.testing.assert_close(any_lm.logits(ids), want, rtol=1e-4, atol=1e-4)
            any_lm.generate(PROMPTS, max_new_tokens=4, chat=False)
            any_lm.score([[7, 8], [9]], [[[4, 5]], [[6], [7, 8, 9]]])
        assert torch.equal(any_lm.logits(ids), base)
        assert n_hooks(any_lm.model) == n_hooks(small.model) == 0 or any_lm.name != "llama"
        assert_same(before)

    def test_alpha_or_strength_zero_never_calls_the_small_model(self, lm, ids, patch):
        nowhere = Small("no/such-model", "0" * 16)
        base = lm.logits(ids)
        for off in (
            patch.at(0),
            LogitPatch(patch.deltas, nowhere, alpha=0.0),
            LogitPatch({}, nowhere),
            LogitPatch(patch.deltas, nowhere, strength=0),
        ):
            with off.on(lm):
                assert n_hooks(lm.model) == 0
                assert torch.equal(lm.logits(ids), base)

    def test_beside_itself_at_alpha_one_it_says_what_the_trained_copy_says(self, lm, ids):
        twin = LM(copy.deepcopy(lm.model), make_tokenizer(), name="twin")
        deltas = changes(lm.model)
        with LogitPatch(deltas, twin).on(lm):
            said = lm.logits(ids)
        torch.testing.assert_close(said, changed(lm.model, deltas)(ids).logits, rtol=1e-4, atol=1e-4)

    def test_strength_is_a_share_of_alpha(self, lm, ids, patch):
        base = lm.logits(ids)
        shifts = {}
        for strength in (0.5, 1.0):
            with patch.at(strength).on(lm):
                shifts[strength] = lm.logits(ids) - base
        torch.testing.assert_close(shifts[0.5], shifts[1.0] / 2, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 5])], ids=["last", "three", "chosen"])
    def test_where_few_logits_are_asked_for_those_are_shifted(self, lm, ids, patch, kept):
        with patch.on(lm):
            whole = lm.logits(ids)
            some = lm.model(input_ids=ids, logits_to_keep=kept).logits
        want = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
        torch.testing.assert_close(some, want)

    def test_a_loss_is_that_of_the_shifted_logits(self, lm, ids, patch):
        with patch.on(lm):
            output = lm.model(input_ids=ids, labels=ids)
        want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(output.loss, want)

    def test_gradients_reach_the_big_model_only(self, lm, ids, small, patch):
        with patch.on(lm):
            lm.logits(ids).sum().backward()
        assert all(p.grad is None for p in small.model.parameters())
        assert all(p.grad is not None for p in lm.model.parameters())

    def test_in_bfloat16_it_says_bfloat16(self, ids, patch):
        lm = LM(make_hf().to(torch.bfloat16), make_tokenizer())
        with patch.on(lm):
            assert lm.logits(ids).dtype == torch.bfloat16

    def test_compiled_code_is_shifted_too(self, lm, ids, patch, fresh_compiler):
        compiled = LM(torch.compile(lm.model, backend="eager"), make_tokenizer())
        with torch.no_grad(), patch.on(lm):
            want, said = lm.logits(ids), lm.generate(PROMPTS, max_new_tokens=4, chat=False)
        with torch.no_grad(), patch.on(compiled) as switch:
            torch.testing.assert_close(compiled.logits(ids), want)
            assert compiled.generate(PROMPTS, max_new_tokens=4, chat=False) == said
            switch.enabled = False
            torch.testing.assert_close(compiled.logits(ids), lm.logits(ids))


class TestCaches:
    def test_cached_decoding_equals_full_recomputation_of_a_left_padded_batch(self, lm, patch, spoken):
        prompts = [lm.encode(p, chat=False) for p in PROMPTS]
        lm.model.generation_config.eos_token_id = None
        rows = [list(p) for p in prompts]
        for row in rows:
            for _ in range(32):
                row.append(int(spoken(row)[-1].argmax()))
        want = [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]
        lm.model.generation_config.eos_token_id = [VOCAB + 1]
        with patch.on(lm):
            assert lm.generate_ids(prompts, max_new_tokens=32) == want
            assert lm.generate_ids(prompts, max_new_tokens=32, use_cache=False) == want
            assert lm.generate_ids(prompts, max_new_tokens=32, batch_size=1) == want

    def test_without_the_second_cache_the_answers_would_differ(self, lm, patch):
        """What the offset is after the first token depends on what both states remember."""
        with patch.on(lm):
            shifted = lm.generate(PROMPTS, max_new_tokens=12, chat=False)
        assert shifted != lm.generate(PROMPTS, max_new_tokens=12, chat=False)

    def test_of_any_library_generation_needs_no_cache_and_no_batch(self, any_lm, patch):
        with patch.on(any_lm):
            together = any_lm.generate(PROMPTS, max_new_tokens=8, chat=False)
            assert together == any_lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
            assert together == [any_lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]

    def test_beams_take_their_caches_along(self, lm, patch):
        ids = torch.tensor([[7, 8, 9, 10], [11, 12, 20, 21]])
        settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "attention_mask": torch.ones_like(ids)}
        with patch.on(lm):
            cached = lm.model.generate(ids, use_cache=True, **settings)
            assert torch.equal(cached, lm.model.generate(ids, use_cache=False, **settings))
        assert not torch.equal(cached, lm.model.generate(ids, **settings))

    def test_answers_that_share_a_prompt_are_scored_as_if_alone(self, any_lm, patch):
        prompts, answers = [[7, 8, 9], [10, 11, 12, 13, 14]], [[[4, 5, 6], [7]], [[20, 21], [22, 23, 24, 25], [26]]]
        with patch.on(any_lm):
            scored = any_lm.score(prompts, answers)
            for prompt, group, found in zip(prompts, answers, scored, strict=True):
                for answer, one in zip(group, found, strict=True):
                    logits = any_lm.logits(torch.tensor([prompt + answer]))[0].log_softmax(-1)
                    want = [logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
                    torch.testing.assert_close(one.logprobs, torch.stack(want), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("small", ["llama", "gemma2"], indirect=True)  # the latter's cache forgets, by a window
    @torch.no_grad()
    def test_a_cache_that_is_cropped_repeated_and_selected_is_followed(self, lm, patch, spoken):
        row = [7, 8, 9, 10, 11, 12]
        cache = new_cache(lm.model, 1)
        with patch.on(lm):
            forward(lm.model, torch.tensor([row]), cache=cache)
            cache.crop(-2)
            cache.batch_repeat_interleave(3)
            cache.batch_select_indices(torch.tensor([2, 0]))
            said = forward(lm.model, torch.tensor([[30, 31], [32, 33]]), cache=cache).logits
        for i, more in enumerate(([30, 31], [32, 33])):
            torch.testing.assert_close(said[i], spoken(row[:4] + more)[-2:], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_switched_off_for_a_while_it_reads_what_it_missed(self, lm, patch, spoken):
        row, cache = [7, 8, 9, 10, 11, 12], new_cache(lm.model, 1)
        with patch.on(lm) as switch:
            forward(lm.model, torch.tensor([row[:2]]), cache=cache)
            switch.enabled = False
            off = forward(lm.model, torch.tensor([row[2:5]]), cache=cache).logits[0]
            switch.enabled = True
            on = forward(lm.model, torch.tensor([row[5:]]), cache=cache).logits[0]
        torch.testing.assert_close(off, spoken(row[:5], alpha=0)[-3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(on, spoken(row)[-1:], rtol=1e-4, atol=1e-4)

    def test_tokens_that_it_never_saw_are_told(self, lm, patch):
        cache = new_cache(lm.model, 1)
        forward(lm.model, torch.tensor([[7, 8]]), cache=cache)
        with patch.on(lm):
            with pytest.raises(PatchNotReached, match=r"mid-sequence: .* the 2 tokens in the cache"):
                forward(lm.model, torch.tensor([[9]]), cache=cache)
            with pytest.raises(PatchNotReached, match="call LlamaForCausalLM with input_ids"):
                lm.model(inputs_embeds=torch.zeros(1, 2, D_MODEL))


class TestAmongOthers:
    def test_two_offsets_and_a_gated_edit_follow_one_cache(self, lm, patch):
        feature = FeaturePatch(
            dictionary=make_sae("jumprelu"), features=[1, 3, 5], edit=DenseClamp(to=-4.0), gate=SequenceGate(above=0.01)
        )
        other = make_small("llama")
        stack = Stack((patch, feature, LogitPatch(changes(other.model), other, alpha=0.5)))
        prompts, answers = [[7, 8, 9], [10, 11, 12, 13, 14]], [[[4, 5, 6], [7, 8]], [[20, 21], [22, 23, 24, 25]]]
        with stack.on(lm) as switch:
            together = lm.score(prompts, answers)
            alone = [lm.score([p], [[a]])[0][0] for p, group in zip(prompts, answers, strict=True) for a in group]
            for one, want in zip((s for group in together for s in group), alone, strict=True):
                torch.testing.assert_close(one.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)
            switch.enabled = False
            off = lm.score(prompts, answers)
        base = lm.score(prompts, answers)
        assert all(
            torch.equal(a.logprobs, b.logprobs)
            for x, y in zip(off, base, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert n_hooks(lm.model) == 0

    def test_an_exception_inside_restores(self, lm, small, patch, ids, monkeypatch):
        before, base = state(lm, small), lm.logits(ids)
        with pytest.raises(ZeroDivisionError), patch.on(lm):
            raise ZeroDivisionError
        with patch.on(lm):
            monkeypatch.setattr(small.model, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                lm.logits(ids)
        assert n_hooks(lm.model) == n_hooks(small.model) == 0
        assert_same(before)
        assert torch.equal(lm.logits(ids), base)

    def test_what_calls_the_head_apart_is_told_of_it(self, lm, ids, patch):
        head = Head(lm.model)
        with patch.on(lm), pytest.raises(NotExact, match="a patch edits what LlamaForCausalLM says after its head"):
            head.hidden(ids, None)
        head.hidden(ids, None)


class TestVocabulary:
    def test_padded_vocabularies_are_cut_to_the_tokens_there_are(self, ids):
        big, small = make_hf(), make_small("llama")
        big.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
        small.model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
        lm, deltas = LM(big, make_tokenizer()), changes(small.model)
        assert common_vocabulary(lm, small) == VOCAB
        base = lm.logits(ids)
        shift = changed(small.model, deltas)(ids).logits - small.model(ids).logits
        with LogitPatch(deltas, small).on(lm):
            said = lm.logits(ids)
        assert torch.equal(said[..., VOCAB:], base[..., VOCAB:])
        torch.testing.assert_close(said[..., :VOCAB], base[..., :VOCAB] + shift[..., :VOCAB], rtol=1e-4, atol=1e-4)

    def test_another_tokenizer_is_refused(self, lm, small, patch):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["w99"])
        other = LM(small.model, tokenizer, name="other")
        with pytest.raises(PatchMismatch, match=r"other has another tokenizer than tiny-llama: 'w99' is token 48"):
            common_vocabulary(lm, other)
        with pytest.raises(PatchMismatch, match="another tokenizer"), LogitPatch(patch.deltas, other).on(lm):
            pass

    def test_a_small_model_that_lacks_tokens_is_refused(self, lm):
        small = make_small("llama")
        small.model.resize_token_embeddings(VOCAB - 8, mean_resizing=False)
        with pytest.raises(PatchMismatch, match="has 48 logits and small 40, but their tokenizer has 48 tokens"):
            common_vocabulary(lm, small)


class TestOnDisk:
    @pytest.fixture
    def folder(self, lm, small, patch, tmp_path):
        small.model.save_pretrained(tmp_path / "small")
        small.tokenizer.save_pretrained(tmp_path / "small")
        named = Small(str(tmp_path / "small"), small.fingerprint)
        return LogitPatch(patch.deltas, named, alpha=ALPHA).at(0.5).save(tmp_path / "patch", lm)

    def test_saved_and_loaded_it_finds_its_small_model_and_does_the_same(self, lm, ids, patch, folder):
        loaded = load_patch(folder, lm)
        assert (loaded.alpha, loaded.strength) == (ALPHA, 0.5)
        with patch.at(0.5).on(lm):
            want = lm.logits(ids)
        with loaded.on(lm):
            assert torch.equal(lm.logits(ids), want)

    def test_another_base_is_refused(self, folder):
        with pytest.raises(PatchMismatch, match="made on tiny-llama"):
            load_patch(folder, LM(make_hf(seed=1), make_tokenizer()))

    def test_without_its_small_model_it_says_how_to_hand_it_over(self, lm, ids, small, patch, folder, tmp_path):
        (tmp_path / "small").rename(tmp_path / "elsewhere")
        with pytest.raises(ModelNotFound, match=r"runs beside .*small .*load_patch\(folder\)\.beside\(small_lm\)"):
            load_patch(folder, lm)
        loaded = load_patch(folder).beside(small)
        with patch.at(0.5).on(lm):
            want = lm.logits(ids)
        with loaded.on(lm):
            assert torch.equal(lm.logits(ids), want)
        with pytest.raises(PatchMismatch, match=r"trained beside .*; given: tiny-llama"):
            loaded.beside(lm)

    def test_another_model_under_the_small_ones_name_is_refused(self, lm, folder, tmp_path):
        make_hf("gpt2", seed=9).save_pretrained(tmp_path / "small")
        with pytest.raises(PatchMismatch, match="trained beside"):
            load_patch(folder, lm)

    def test_its_digest_knows_alpha_and_the_small_model(self, patch, small):
        other = LogitPatch(patch.deltas, small, alpha=0.1)
        elsewhere = LogitPatch(patch.deltas, make_small("llama"), alpha=ALPHA)
        assert len({patch.digest, other.digest, elsewhere.digest}) == 3
        assert patch.n_parameters == sum(p.numel() for p in small.model.parameters())


def test_what_cannot_be_is_refused(lm, patch):
    with pytest.raises(InvalidConfig, match="alpha is 0"):
        LogitPatch(patch.deltas, patch.small, alpha=-1.0)
    with (
        pytest.raises(InvalidConfig, match="a Hugging Face model of its own"),
        LogitPatch(changes(lm.model), lm).on(lm),
    ):
        pass
