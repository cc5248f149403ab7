"""The shift of feed-forwards: what is planted is found, blocks are ranked by its spread, and routing is read right."""

from __future__ import annotations

import pytest
import torch
from conftest import N_LAYERS, make_bridge, make_hf, make_hooked, make_tokenizer, n_hooks, words
from mixtures import MIXTURES, make_mixture

from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import InvalidConfig, SiteNotFound
from concept_unlearn.features.shift import feed_forward_shift, most_shifted, routed
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.locate import find_router, locate_units


@pytest.fixture
def scope():
    return Scope.of(
        "two", forget=[words(30, 31, 32, 33), words(34, 35)], retain=[words(8, 9, 10)], near=[words(20, 21)], out_far=[]
    )


def rows(lm, passages):
    return [torch.tensor([lm.encode(p.text, chat=False)]) for p in passages]


class TestTheChoice:
    def test_it_is_the_top_half_by_standard_deviation(self):
        spread = {0: 0.1, 1: 3.0, 2: 0.5, 3: 2.0, 4: 0.0, 5: 0.4}
        shift = {layer: s * torch.tensor([1.0, -1.0, 1.0, -1.0]) + 100 * layer for layer, s in spread.items()}
        assert most_shifted(shift) == (1, 2, 3)
        assert most_shifted(shift, 1) == (1,)
        assert most_shifted(shift, 5) == (0, 1, 2, 3, 5)

    def test_units_that_shift_all_alike_do_not_count(self):
        assert most_shifted({0: torch.full((8,), 9.0), 1: torch.tensor([0.1, 0.0])}) == (1,)

    def test_equal_blocks_are_taken_from_below(self):
        assert most_shifted(dict.fromkeys(range(4), torch.tensor([0.0, 1.0]))) == (0, 1)

    @pytest.mark.parametrize("n", [0, 5])
    def test_no_more_than_there_are(self, n):
        with pytest.raises(InvalidConfig, match=f"from 1 to 4, .* given: {n}"):
            most_shifted(dict.fromkeys(range(4), torch.ones(2)), n)


class TestDense:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2"])
    def test_it_is_the_difference_of_mean_absolute_hidden_units(self, kind, scope):
        lm, layer = LM(make_hf(kind), make_tokenizer(), name=kind), 1
        seen = []
        units = locate_units(lm.model, layer).module
        assert units.weight.numel() in (32 * 16, 64 * 16)  # of the map down, not up: its input is read below
        handle = units.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].abs()))
        means = []
        with torch.no_grad():
            for passages in (scope.forget, (*scope.retain, *scope.near)):
                seen.clear()
                for ids in rows(lm, passages):
                    lm.logits(ids)
                means.append(torch.cat(seen).mean(0))
        handle.remove()
        found = feed_forward_shift(lm, scope)[layer]
        assert len(found) > 16
        torch.testing.assert_close(found.float(), means[0] - means[1], rtol=1e-4, atol=1e-5)

    def test_the_same_through_every_library(self, scope, tmp_path):
        bridge = LM(make_bridge(tmp_path))
        plain = LM(make_hf(), bridge.tokenizer)
        want, found = feed_forward_shift(plain, scope), feed_forward_shift(bridge, scope)
        for layer in range(N_LAYERS):
            torch.testing.assert_close(found[layer], want[layer], rtol=1e-4, atol=1e-5)
        assert {len(x) for x in feed_forward_shift(LM(make_hooked(tmp_path)), scope).values()} == {32}

    def test_the_block_in_which_forget_words_do_something_is_the_first(self, scope):
        """Its feed-forward reads only the direction that forget words alone have."""
        lm = LM(make_hf(), make_tokenizer())
        with torch.no_grad():
            for block in lm.model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
                block.mlp.up_proj.weight[:] = block.mlp.gate_proj.weight[:] = 0.0
            words_of = lm.model.model.embed_tokens.weight
            words_of[:, 0] = 0.0
            words_of[30:36, 0] = 5.0
            mlp = lm.model.model.layers[2].mlp
            mlp.up_proj.weight[:8, 0] = mlp.gate_proj.weight[:8, 0] = 1.0
        shift = feed_forward_shift(lm, scope)
        assert most_shifted(shift) == (2,)
        assert (shift[2][:8] > 1).all()
        assert not shift[2][8:].any()
        assert not shift[0].any()

    def test_no_feed_forward_is_an_error_that_says_where(self, scope):
        lm = LM(make_hf(), make_tokenizer())
        block = lm.model.model.layers[1]
        block.something = block.mlp
        del block.mlp
        with pytest.raises(SiteNotFound, match=r"has no place for blocks.1.*it has self_attn"):
            feed_forward_shift(lm, scope)

    def test_nor_is_one_without_a_linear_map(self, scope):
        lm = LM(make_hf(), make_tokenizer())
        lm.model.model.layers[1].mlp = torch.nn.Identity()
        with pytest.raises(SiteNotFound, match="Identity of block 1 has no linear map"):
            feed_forward_shift(lm, scope)

    def test_it_leaves_no_hook(self, scope):
        lm = LM(make_hf(), make_tokenizer())
        before = n_hooks(lm.model)
        feed_forward_shift(lm, scope)
        assert n_hooks(lm.model) == before


class TestMixtures:
    @pytest.mark.parametrize("kind", MIXTURES)
    def test_places_of_a_mixture_are_found(self, kind, ids):
        lm = LM(make_mixture(kind), make_tokenizer())
        with torch.no_grad(), lm.read(Site("mlp_in", 1), Site("mlp_out", 1)) as seen:
            lm.logits(ids)
        block, h = lm.model.model.layers[1], seen[Site("mlp_in", 1)]
        with torch.no_grad():
            out = block.mlp(h)
        torch.testing.assert_close(seen[Site("mlp_out", 1)], out[0] if isinstance(out, tuple) else out)
        assert find_router(lm.model, 1) is not None
        assert find_router(make_hf(), 1) is None

    @pytest.mark.parametrize("kind", MIXTURES)
    def test_shares_of_tokens_are_of_the_experts_with_the_largest_logits(self, kind, scope):
        lm, layer = LM(make_mixture(kind), make_tokenizer()), 1
        router, shares = find_router(lm.model, layer), []
        for passages in (scope.forget, (*scope.retain, *scope.near)):
            chosen = []
            for ids in rows(lm, passages):
                site = Site("mlp_in", layer)
                h = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site][0]
                logits = torch.nn.functional.linear(h, router.weight, getattr(router, "bias", None))
                chosen.append(logits.argsort(dim=-1, descending=True)[:, :2])
            tokens = torch.cat(chosen)
            shares.append(torch.stack([(tokens == expert).any(-1).float().mean() for expert in range(4)]))
            assert shares[-1].sum() == pytest.approx(2.0)
        found = feed_forward_shift(lm, scope)[layer]
        torch.testing.assert_close(found.float(), shares[0] - shares[1])

    def test_logits_alone_are_read_by_the_largest(self):
        logits = torch.tensor([[0.1, 5.0, -3.0, 2.0]])
        chosen, n = routed(logits, 2)
        assert (set(chosen[0].tolist()), n) == ({1, 3}, 4)

    def test_what_the_router_itself_chose_goes_before_its_logits(self):
        chosen, n = routed((torch.randn(3, 4), torch.rand(3, 2), torch.tensor([[0, 2]] * 3)), 2)
        assert (chosen.tolist(), n) == ([[0, 2]] * 3, 4)

    def test_a_router_that_tells_nothing_is_an_error(self):
        with pytest.raises(SiteNotFound, match="no logits"):
            routed((None, torch.arange(3)), 2)
