"""An expert beside the feed-forward: nothing at the start, exactly its formula, and only where its router says so."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, make_bridge, make_hf, make_hooked, make_tokenizer, n_hooks, words
from mixtures import make_mixture

from concept_unlearn.data.encode import pad
from concept_unlearn.dictionaries import direction
from concept_unlearn.errors import InvalidConfig, PatchMismatch, SiteNotFound
from concept_unlearn.gates import SOFTNESS, ProbeGate, SequenceGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.context import Context, Memory, answering
from concept_unlearn.lm.forward import forward, new_cache
from concept_unlearn.patches import ExpertPatch, Stack, load_patch
from concept_unlearn.patches.expert import Experts
from concept_unlearn.patches.forget_expert import Calibration, ForgetExpert

PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40, 41, 42)]


def expert(seed=0, *, d=D_MODEL, threshold=0.5, scale=0.5, **changes):
    """One that has learnt something, open for about half of the tokens."""
    made = ForgetExpert(d, 8, seed=seed, threshold=threshold)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        made.bias.zero_()
        for name, value in changes.items():
            made.get_parameter(name).fill_(value)
    return made.requires_grad_(False)


def patch_of(layers=(0, 1), **settings):
    return ExpertPatch(experts={layer: expert(layer) for layer in layers}, **settings)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "gemma2", "opt", "mixtral", "hooked", "bridge"])
def model(request, tmp_path):
    match request.param:
        case "hooked":
            return LM(make_hooked(tmp_path))
        case "bridge":
            return LM(make_bridge(tmp_path))
        case "mixtral":
            return LM(make_mixture(), make_tokenizer(), name="mixtral")
    return LM(make_hf(request.param), make_tokenizer(), name=request.param)


class TestTheFormula:
    @pytest.mark.parametrize(("d", "width", "n"), [(8, 4, 76 + 9 + 32), (16, 64, 2 * 16 * 64 + 64 + 16 + 17 + 32)])
    def test_an_expert_has_so_many_parameters(self, d, width, n):
        assert sum(p.numel() for p in ForgetExpert(d, width).parameters()) == n
        assert ExpertPatch(experts={0: ForgetExpert(d, width), 2: ForgetExpert(d, width)}).n_parameters == 2 * n

    @pytest.mark.parametrize(("n", "parameters"), [(1, 32), (9, 288)])
    def test_a_calibration_begins_as_the_identity_and_leaves_zero_alone(self, n, parameters):
        calibration = Calibration(n, generator=torch.Generator().manual_seed(0))
        w = torch.softmax(torch.randn(50, n), -1)
        assert sum(p.numel() for p in calibration.parameters()) == parameters
        assert torch.equal(calibration(w), w)
        torch.nn.init.normal_(calibration.w_out)
        assert not torch.equal(calibration(w), w)
        assert not calibration(torch.zeros(n)).any()

    def test_a_calibrated_share_stays_between_0_and_1(self):
        s = torch.linspace(0, 1, 101)
        for seed in range(5):
            found = expert(seed, scale=3.0).calibrated(s)
            assert found.min() >= 0
            assert found.max() <= 1
            assert found[0] == 0

    @pytest.mark.parametrize("rho", [0, 1])
    def test_each_token_gets_what_the_formula_says(self, lm, ids, rho):
        """y = F(h) + s' (E(h) - rho F(h)) where s is above the threshold, F(h) elsewhere, to the last bit."""
        one = expert()
        sites = Site("mlp_in", 1), Site("mlp_out", 1)
        with torch.no_grad(), lm.read(*sites) as seen:
            lm.logits(ids)
            h, f = (seen[site] for site in sites)
            with ExpertPatch(experts={1: one}, rho=rho).on(lm), lm.read(sites[1]) as edited:
                lm.logits(ids)
            y = edited[sites[1]]
        s = torch.sigmoid(h @ one.router + one.bias)
        open_ = s > one.threshold
        assert 0 < open_.sum() < open_.numel()
        hidden = torch.nn.functional.gelu(h @ one.w_in.T + one.b_in)
        w = s[..., None]
        w = (w + torch.nn.functional.gelu(w @ one.calibration.w_in.T) @ one.calibration.w_out.T).clamp(0, 1)
        want = f + w * (hidden @ one.w_out.T + one.b_out - rho * f)
        torch.testing.assert_close(y[open_], want[open_])
        assert torch.equal(y[~open_], f[~open_])

    def test_one_that_replaces_and_is_sure_says_only_what_it_says(self, lm, ids):
        sure = expert(router=0.0, bias=50.0, w_out=0.0, b_out=0.25)
        sure.calibration.w_out.zero_()
        site = Site("mlp_out", 1)
        with torch.no_grad(), ExpertPatch(experts={1: sure}, rho=1).on(lm), lm.read(site) as seen:
            lm.logits(ids)
        torch.testing.assert_close(seen[site], torch.full_like(seen[site], 0.25))


class TestAWindow:
    """s of a token is of the soft maximum over the last tokens, by brute force and however the passes cut them."""

    def windowed(self, window, **changes):
        one = expert(3, **changes)
        one.window = window
        return one

    def brute(self, one, h):
        scores = (h @ one.router + one.bias).double()
        found = torch.zeros_like(scores)
        for b, t in torch.cartesian_prod(torch.arange(h.shape[0]), torch.arange(h.shape[1])).tolist():
            lately = scores[b, max(t - one.window + 1, 0) : t + 1]
            found[b, t] = SOFTNESS * ((lately / SOFTNESS).exp().mean()).log()
        return torch.sigmoid(found)

    @pytest.mark.parametrize("window", [1, 2, 4, 100])
    def test_a_token_is_let_through_by_what_came_lately(self, lm, ids, window):
        one = self.windowed(window)
        sites = Site("mlp_in", 1), Site("mlp_out", 1)
        with torch.no_grad(), lm.read(*sites) as seen:
            lm.logits(ids)
            h, f = (seen[site] for site in sites)
            with ExpertPatch(experts={1: one}).on(lm), lm.read(sites[1]) as edited:
                lm.logits(ids)
        s = self.brute(one, h)
        open_ = s > one.threshold
        assert 0 < open_.sum() < open_.numel()
        assert torch.equal((edited[sites[1]] != f).any(-1), open_)
        hidden = torch.nn.functional.gelu(h @ one.w_in.T + one.b_in) @ one.w_out.T + one.b_out
        want = f + one.calibrated(s.float())[..., None] * hidden
        torch.testing.assert_close(edited[sites[1]][open_], want[open_], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("sticky", [False, True])
    def test_passes_padding_and_the_cache_change_nothing(self, model, sticky):
        patch = ExpertPatch(experts={0: self.windowed(3), 1: self.windowed(5)}, sticky=sticky)
        with patch.on(model):
            together = model.generate(PROMPTS, max_new_tokens=5, chat=False)
            assert together == [model.generate(p, max_new_tokens=5, chat=False)[0] for p in PROMPTS]
            assert together == model.generate(PROMPTS, max_new_tokens=5, chat=False, use_cache=False)

    def test_it_is_saved_and_trained_with_it(self, lm, ids, tmp_path):
        patch = ExpertPatch(experts={0: self.windowed(3)})
        again = load_patch(patch.save(tmp_path, lm), lm)
        assert again.experts[0].window == 3
        assert again.digest == patch.met(lm).digest != ExpertPatch(experts={0: self.windowed(2)}).met(lm).digest
        one = self.windowed(3, bias=1.0).requires_grad_(True)
        _through(one, torch.randn(2, 5, D_MODEL), torch.randn(2, 5, D_MODEL)).sum().backward()
        assert one.w_in.grad.any()
        assert one.router.grad.isfinite().all()
        assert one.router.grad.any()

    def test_what_every_chat_begins_with_is_neither_read_nor_changed(self, lm):
        sure = self.windowed(4, router=0.0, bias=5.0)
        ids = torch.tensor([lm.encode(words(9, 10, 11), chat=True)])
        assert lm.chat_head[0] == ids[0, 0]
        site = Site("mlp_out", 0)
        with torch.no_grad(), lm.read(site) as seen:
            lm.logits(ids)
            plain = seen[site]
            with ExpertPatch(experts={0: sure}).on(lm), lm.read(site) as edited:
                lm.logits(ids)
        changed = (edited[site] != plain).any(-1)[0]
        assert changed.tolist() == [False] + [True] * 5


class TestWhereTheRouterIsClosed:
    @pytest.mark.parametrize("rho", [0, 1])
    def test_a_new_expert_changes_no_bit(self, model, ids, rho):
        with torch.no_grad():
            before = model.logits(ids)
            with ExpertPatch(experts={i: ForgetExpert(D_MODEL, 8) for i in range(3)}, rho=rho).on(model):
                assert torch.equal(model.logits(ids), before)

    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e38])
    @pytest.mark.parametrize("rho", [0, 1])
    def test_nor_does_it_for_any_input(self, value, rho):
        x, h = torch.randn(2, 5, D_MODEL), torch.randn(2, 5, D_MODEL)
        x[0, 1], h[0, 2], h[1, 3, 4] = value, value, value
        torch.testing.assert_close(_through(ForgetExpert(D_MODEL, 8), h, x, rho=rho), x, rtol=0, atol=0, equal_nan=True)

    def test_an_open_router_with_an_untrained_expert_adds_nothing(self):
        x, h, untrained = torch.randn(2, 5, D_MODEL), torch.randn(2, 5, D_MODEL), ForgetExpert(D_MODEL, 8)
        untrained.bias.data.fill_(3.0)
        assert torch.equal(_through(untrained, h, x), x)

    def test_closed_tokens_stay_as_they_are_beside_open_ones(self):
        x, h = torch.randn(2, 5, D_MODEL), torch.randn(2, 5, D_MODEL)
        x[0, 0] = float("inf")
        picky = expert(router=0.0, bias=-1.0)
        picky.router[3] = 1.0
        h[..., 3] = -9.0
        h[1, 2, 3] = 9.0
        y = _through(picky, h, x)
        closed = torch.ones(2, 5, dtype=torch.bool)
        closed[1, 2] = False
        assert torch.equal(y[closed], x[closed])
        assert not torch.equal(y[1, 2], x[1, 2])

    def test_a_share_on_the_threshold_is_closed(self):
        at = ForgetExpert(D_MODEL, 8, threshold=0.5)
        at.bias.data.zero_()
        assert not at.route(torch.zeros(3)).any()

    def test_gradients_are_finite_beside_tokens_that_are_not(self):
        one = expert(bias=5.0).requires_grad_(True)
        x, h = torch.randn(1, 4, D_MODEL), torch.zeros(1, 4, D_MODEL)
        h[0, 1] = float("nan")
        _through(one, h, x).sum().backward()
        assert one.b_out.grad.any()
        assert all(p.grad.isfinite().all() for name, p in one.named_parameters() if name not in ("router", "bias"))


class TestThePatch:
    def test_off_is_off_and_on_is_as_made(self, model, ids):
        patch = patch_of()
        with torch.no_grad():
            before, hooks = model.logits(ids), n_hooks(model.model)
            weights = {n: p.clone() for n, p in model.model.named_parameters()}
            with patch.on(model) as switch:
                after = model.logits(ids)
                switch.enabled = False
                assert torch.equal(model.logits(ids), before)
            with patch.at(0).on(model):
                assert torch.equal(model.logits(ids), before)
            with patch.at(0.5).at(1).on(model):
                assert torch.equal(model.logits(ids), after)
            assert torch.equal(model.logits(ids), before)
        assert (after - before).abs().max() > 1e-3
        assert n_hooks(model.model) == hooks
        assert all(torch.equal(p, weights[n]) for n, p in model.model.named_parameters())

    def test_strength_is_a_share_of_the_change_at_one_block(self, lm, ids):
        site, patch = Site("mlp_out", 1), patch_of((1,))
        found = {}
        for strength in (0, 0.25, 1):
            with torch.no_grad(), patch.at(strength).on(lm), lm.read(site) as seen:
                lm.logits(ids)
            found[strength] = seen[site]
        torch.testing.assert_close(found[0.25], 0.75 * found[0] + 0.25 * found[1])

    def test_an_exception_leaves_no_hook(self, lm):
        before = n_hooks(lm.model)
        with pytest.raises(KeyboardInterrupt), patch_of().on(lm):
            raise KeyboardInterrupt
        assert n_hooks(lm.model) == before

    def test_it_stacks_with_others_in_either_order(self, lm, ids):
        first, second = patch_of((1,)), ExpertPatch(experts={1: expert(7)}, rho=1)
        with torch.no_grad():
            with first.on(lm), second.on(lm):
                nested = lm.logits(ids)
            with Stack((first, second)).on(lm):
                assert torch.equal(lm.logits(ids), nested)
            with second.on(lm):
                with first.on(lm):
                    pass
                alone = lm.logits(ids)
            with ExpertPatch(experts={1: expert(7)}, rho=1).on(lm):
                assert torch.equal(lm.logits(ids), alone)
        assert not torch.equal(nested, alone)

    @pytest.mark.parametrize("settings", [{}, {"sticky": True}, {"rho": 1}], ids=str)
    def test_however_it_is_run_it_gives_the_same_tokens(self, lm, settings):
        patch = patch_of(**settings)
        base = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
        with patch.on(lm):
            together = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
            assert together == lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
            assert together == [lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]
            ids = torch.tensor([lm.encode(p, chat=False)[:3] for p in (PROMPTS[0], PROMPTS[2], PROMPTS[3])])
            run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, "do_sample": False, "num_beams": 3}
            beams = lm.model.generate(ids, use_cache=True, **run)
            assert torch.equal(beams, lm.model.generate(ids, use_cache=False, **run))
        assert together != base
        assert lm.generate(PROMPTS, max_new_tokens=8, chat=False) == base

    @pytest.mark.parametrize("sticky", [False, True])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side_changes_nothing(self, lm, sticky, side):
        rows = [lm.encode(p, chat=False) for p in PROMPTS]
        ids, mask = pad(rows, side=side)
        with torch.no_grad(), patch_of(sticky=sticky).on(lm):
            together = forward(lm.model, ids, mask).logits
            for i, row in enumerate(rows):
                alone = lm.logits(torch.tensor([row]))[0]
                torch.testing.assert_close(together[i][mask[i]], alone, rtol=1e-4, atol=1e-4)

    def test_a_saved_one_does_the_same_and_another_model_refuses_it(self, lm, ids, tmp_path):
        patch = patch_of(rho=1, sticky=True).at(0.7)
        loaded = load_patch(patch.save(tmp_path, lm), lm)
        assert loaded.digest == patch.digest
        assert (loaded.rho, loaded.sticky, loaded.strength, loaded.layers) == (1, True, 0.7, (0, 1))
        assert [e.threshold for e in loaded.experts.values()] == [0.5, 0.5]
        with torch.no_grad():
            with patch.on(lm):
                want = lm.logits(ids)
            with loaded.on(lm):
                assert torch.equal(lm.logits(ids), want)
        with pytest.raises(PatchMismatch):
            load_patch(tmp_path, LM(make_hf("gpt2"), make_tokenizer()))

    def test_its_experts_get_no_gradient_and_the_callers_own_stay_trainable(self, lm, ids):
        own = ForgetExpert(D_MODEL, 8)
        patch = ExpertPatch(experts={0: own})
        assert all(p.requires_grad for p in own.parameters())
        assert not any(p.requires_grad for p in patch.experts[0].parameters())

    def test_a_gate_narrows_it_and_reads_what_the_router_says(self, lm, ids):
        with torch.no_grad():
            before = lm.logits(ids)
            with patch_of(gate=TokenGate(above=0.9999)).on(lm):
                assert torch.equal(lm.logits(ids), before)
            with patch_of(gate=TokenGate(above=0.0)).on(lm):
                narrowed = lm.logits(ids)
            with patch_of().on(lm):
                assert torch.equal(lm.logits(ids), narrowed)
            for above, same in ((0.99, True), (0.01, False)):  # a share of tokens that the router lets through
                with patch_of(gate=SequenceGate(above=above)).on(lm):
                    assert torch.equal(lm.logits(ids), before) is same


class TestSticky:
    """The first block's attention is silent, so that its router sees words alone, and waits for one of them."""

    WORD, OTHERS = 30, (7, 8, 9, 10, 11)

    @pytest.fixture
    def lm(self, lm):
        with torch.no_grad():
            lm.model.model.layers[0].self_attn.o_proj.weight.zero_()
        return lm

    @pytest.fixture
    def one(self, lm):
        ids, site = torch.tensor([[self.WORD, *self.OTHERS]]), Site("mlp_in", 0)
        h = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site][0]
        waiting = expert()
        waiting.router.copy_(torch.linalg.pinv(h) @ torch.tensor([5.0, *[-5.0] * len(self.OTHERS)]))
        return waiting

    def changed(self, lm, patch, *passes, asked=()):
        """Which of the tokens, prompt first and then what is answered, come out of the first block otherwise."""

        def run():
            cache, found = new_cache(lm.model, 1), []
            with torch.no_grad(), lm.read(Site("mlp_out", 0)) as seen:
                for ids in passes:
                    forward(lm.model, torch.tensor([ids]), cache=cache)
                    found.append(seen[Site("mlp_out", 0)])
                with answering():
                    for word in asked:
                        forward(lm.model, torch.tensor([[word]]), cache=cache)
                        found.append(seen[Site("mlp_out", 0)])
            return torch.cat(found, 1)

        before = run()
        with patch.on(lm):
            run()  # what it leaves in memory belongs to another sequence
            return [int(x) for x in (run() != before).any(-1)[0]]

    def test_what_follows_the_word_is_let_through_however_the_passes_cut_it(self, lm, one):
        loose, sticky = (ExpertPatch(experts={0: one}, sticky=s) for s in (False, True))
        assert self.changed(lm, loose, [7, 8, 30, 9, 10, 11]) == [0, 0, 1, 0, 0, 0]
        assert self.changed(lm, sticky, [7, 8, 30, 9, 10, 11]) == [0, 0, 1, 1, 1, 1]
        assert self.changed(lm, sticky, [7, 8, 30], [9, 10], [11]) == [0, 0, 1, 1, 1, 1]

    def test_an_answer_is_let_through_if_the_prompt_was(self, lm, one):
        sticky = ExpertPatch(experts={0: one}, sticky=True)
        assert self.changed(lm, sticky, [7, 30, 9], asked=(10, 11)) == [0, 1, 1, 1, 1]
        assert self.changed(lm, sticky, [7, 8, 9], asked=(10, 30, 11)) == [0, 0, 0, 0, 1, 0]

    def test_a_batch_remembers_row_by_row_and_follows_the_cache(self, lm, one):
        cache, site = new_cache(lm.model, 2), Site("mlp_out", 0)
        patch = ExpertPatch(experts={0: one}, sticky=True)
        with torch.no_grad(), lm.read(site) as seen:
            lm.logits(torch.tensor([[10]]))
            before = seen[site][0, 0]
        with torch.no_grad(), patch.on(lm), lm.read(site) as seen, answering():
            forward(lm.model, torch.tensor([[7, 30], [7, 8]]), cache=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            forward(lm.model, torch.tensor([[10], [10]]), cache=cache)
        torch.testing.assert_close(seen[site][0, 0], before)
        assert (seen[site][1, 0] - before).abs().max() > 0.01


class TestBadInput:
    def test_it_needs_experts(self):
        with pytest.raises(InvalidConfig, match="needs experts="):
            ExpertPatch(experts={})

    def test_rho_is_0_or_1(self):
        with pytest.raises(InvalidConfig, match=r"rho is 0 .* given: 0.5"):
            patch_of(rho=0.5)

    def test_a_block_that_is_not_there(self, lm):
        with pytest.raises(SiteNotFound, match="has layers 0 to 2"), patch_of((1, 9)).on(lm):
            pass

    def test_another_width(self, lm, ids):
        says = "width 8 beside a feed-forward of width 16"
        with pytest.raises(PatchMismatch, match=says), ExpertPatch(experts={0: expert(d=8)}).on(lm):
            lm.logits(ids)

    def test_a_model_without_a_feed_forward_there(self, lm):
        block = lm.model.model.layers[1]
        block.something = block.mlp
        del block.mlp
        with pytest.raises(SiteNotFound, match=r"has no place for blocks.1.* it has self_attn"), patch_of((1,)).on(lm):
            pass

    def test_a_sensor_that_comes_too_late(self):
        late = direction(Site("resid_post", 1), torch.ones(D_MODEL), torch.ones(D_MODEL))
        with pytest.raises(InvalidConfig, match="computes after the edit"):
            patch_of((1,), gate=ProbeGate(above=0.0), sensor=late)


def _through(one, h, x, **settings):
    """What comes out of a block's feed-forward that reads h and answers x."""
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    context = Context(everywhere, everywhere, Memory(), everywhere, None, [])
    edits = Experts({0: one}, **settings).edits()
    assert edits[Site("mlp_in", 0)](h, context) is h
    return edits[Site("mlp_out", 0)](x, context)
