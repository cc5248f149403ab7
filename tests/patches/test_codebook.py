"""Codebook patches on live models: exactly what the codebook writes, exactly reversible, however the model is run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import D_MODEL, make_hf, make_sae, make_tokenizer, n_hooks, words

from concept_unlearn.data.encode import pad
from concept_unlearn.dictionaries import direction
from concept_unlearn.dictionaries.codebook import Codebook
from concept_unlearn.edits import Clamp
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig, PatchMismatch
from concept_unlearn.gates import Always, ProbeGate, SequenceGate, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.forward import forward
from concept_unlearn.patches import CodebookPatch, FeaturePatch, Stack, load_patch
from concept_unlearn.patches.codebook import CodeSlice

SITE = Site("resid_post", 1)
PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40, 41, 42)]
READ = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
SENSOR = direction(Site("resid_pre", 1), READ, READ, normalisation="constant_norm_rescale")
GATES = {
    "always": (Always(), None),
    "token": (TokenGate(above=0.0), None),
    "sequence": (SequenceGate(above=0.8), None),
    "streaming": (StreamingGate(above=1.3, drift=0.5), None),
    "probe": (ProbeGate(above=0.0), SENSOR),
    "probe-max": (ProbeGate(above=3.0, pool="max"), SENSOR),
}
WAYS = [("refill", "drop"), ("refill", "keep"), ("zero", "drop"), ("zero", "keep"), ("prune", "drop")]


def make(site=SITE, sizes=(40,), n_active=4, **settings):
    return Codebook(site=site, d_in=settings.pop("d_in", D_MODEL), sizes=sizes, n_active=n_active, **settings)


@pytest.fixture(scope="module")
def codebook():
    return make().requires_grad_(False)


@pytest.fixture(scope="module")
def banned(codebook):
    """The codes that the prompts choose most, but for the first few, which nearly every token chooses."""
    lm = LM(make_hf(), make_tokenizer())
    ids, mask = pad([lm.encode(p, chat=False) for p in PROMPTS], side="right")
    counts = (codebook.encode(lm.activations(ids, mask, SITE)[SITE][mask]) > 0).sum(0)
    return tuple(counts.sort(descending=True, stable=True).indices[4:12].tolist())


def stream(lm, ids, mask=None, patch=None, site=SITE):
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with torch.no_grad(), lm.read(site) as seen:
        if patch is None:
            lm.logits(ids, mask)
        else:
            with patch.on(lm), lm.read(site) as seen:
                lm.logits(ids, mask)
    return seen[site].flatten(2)


@pytest.mark.parametrize(
    ("mode", "error", "gate"),
    [*((*way, "always") for way in WAYS), *(("refill", "drop", g) for g in GATES if g != "always")],
)
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, codebook, banned, mode, error, gate):
    """Cached = uncached = batched = padded = one by one."""
    gate, sensor = GATES[gate]
    patch = CodebookPatch(codebook=codebook, banned=banned, mode=mode, error=error, gate=gate, sensor=sensor)
    base = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    with patch.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
        assert together == [lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]
        assert together[::-1] == lm.generate(PROMPTS[::-1], max_new_tokens=8, chat=False, batch_size=2)
    assert together != base
    assert lm.generate(PROMPTS, max_new_tokens=8, chat=False) == base


@pytest.mark.parametrize("gate", ["sequence", "streaming", "probe", "probe-max"])
def test_gates_of_these_tests_open_for_some_prompts_and_not_for_others(lm, codebook, banned, gate):
    gate, sensor = GATES[gate]
    patch = CodebookPatch(codebook=codebook, banned=banned, gate=gate, sensor=sensor)
    rows = [torch.tensor([lm.encode(p, chat=False)]) for p in PROMPTS]
    changed = [not torch.equal(stream(lm, ids, patch=patch), stream(lm, ids)) for ids in rows]
    assert 0 < sum(changed) < len(PROMPTS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", GATES)
def test_padding_on_either_side_changes_nothing(lm, codebook, banned, side, gate):
    gate, sensor = GATES[gate]
    patch = CodebookPatch(codebook=codebook, banned=banned, gate=gate, sensor=sensor)
    rows = [lm.encode(p, chat=False) for p in PROMPTS]
    ids, mask = pad(rows, side=side)
    with torch.no_grad(), patch.on(lm):
        together = forward(lm.model, ids, mask).logits
        for i, row in enumerate(rows):
            alone = lm.logits(torch.tensor([row]))[0]
            torch.testing.assert_close(together[i][mask[i]], alone, rtol=1e-4, atol=1e-4)


class TestFormula:
    @pytest.mark.parametrize("mode", ["refill", "zero"])
    def test_the_stream_is_what_the_codebook_writes(self, lm, ids, codebook, banned, mode):
        x = stream(lm, ids)
        found = stream(lm, ids, patch=CodebookPatch(codebook=codebook, banned=banned, mode=mode))
        assert torch.equal(found, codebook(x, banned, mode=mode))
        assert not torch.equal(found, codebook(x))

    @pytest.mark.parametrize("mode", ["refill", "zero"])
    def test_or_what_the_ban_takes_from_it(self, lm, ids, codebook, banned, mode):
        """The error stays, and a token that chooses no banned code stays bit-identical."""
        x = stream(lm, ids)
        found = stream(lm, ids, patch=CodebookPatch(codebook=codebook, banned=banned, mode=mode, error="keep"))
        torch.testing.assert_close(found, x + codebook(x, banned, mode=mode) - codebook(x), rtol=1e-4, atol=1e-4)
        chooses = (codebook.encode(x)[..., list(banned)] > 0).any(-1)
        assert 0 < chooses.sum() < chooses.numel()
        assert torch.equal((found != x).any(-1), chooses)

    def test_no_ban_is_the_codebook_model_or_nothing_at_all(self, lm, ids, codebook):
        x = stream(lm, ids)
        assert torch.equal(stream(lm, ids, patch=CodebookPatch(codebook=codebook)), codebook(x))
        assert torch.equal(stream(lm, ids, patch=CodebookPatch(codebook=codebook, mode="prune")), codebook(x))
        assert torch.equal(stream(lm, ids, patch=CodebookPatch(codebook=codebook, error="keep")), x)

    def test_a_token_gate_edits_the_tokens_that_choose_a_banned_code(self, lm, ids, codebook, banned):
        x = stream(lm, ids)
        found = stream(lm, ids, patch=CodebookPatch(codebook=codebook, banned=banned, gate=TokenGate()))
        chooses = (codebook.encode(x)[..., list(banned)] > 0).any(-1)
        assert torch.equal((found != x).any(-1), chooses)

    def test_zero_with_all_codes_banned_says_the_same_of_every_text(self, lm, ids):
        """At the last layer nothing passes beside it."""
        last = make(Site("resid_post", 2))
        with torch.no_grad(), CodebookPatch(codebook=last, banned=tuple(range(40)), mode="zero").on(lm):
            logits = lm.logits(ids).flatten(0, 1)
        assert torch.equal(logits, logits[:1].expand_as(logits))

    @pytest.mark.parametrize("error", ["drop", "keep"])
    @pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.5])
    def test_strength_is_exact_at_its_ends_and_linear_between(self, lm, ids, codebook, banned, strength, error):
        patch = CodebookPatch(codebook=codebook, banned=banned, error=error)
        x, full = stream(lm, ids), stream(lm, ids, patch=patch)
        found = stream(lm, ids, patch=patch.at(strength))
        if strength in (0.0, 1.0):
            assert torch.equal(found, full if strength else x)
        torch.testing.assert_close(found, x + strength * (full - x), rtol=1e-4, atol=1e-4)

    def test_bos_padding_and_sinks_are_never_edited(self, lm):
        ids, mask = pad([[0, 7, 8, 9], [0, 10]], side="left")
        before = stream(lm, ids, mask)
        norms = before.norm(dim=-1)
        sink = float(norms[0, 1:].sort().values[1])
        for bound, extra in ((float("inf"), torch.zeros_like(mask)), (sink, norms > sink)):
            after = stream(lm, ids, mask, CodebookPatch(codebook=make(max_norm=bound)))
            assert torch.equal((after != before).any(-1), mask & (ids != 0) & ~extra)


class TestPrune:
    def test_it_is_refill_bit_for_bit_and_holds_no_banned_code(self, lm, ids, codebook, banned):
        pruned = CodebookPatch(codebook=codebook, banned=banned, mode="prune")
        refill = CodebookPatch(codebook=codebook, banned=banned)
        assert torch.equal(stream(lm, ids, patch=pruned), stream(lm, ids, patch=refill))
        assert pruned.banned == ()
        stored = pruned.tensors()["codebook.codes"]
        assert len(stored) == 40 - len(banned)
        assert not (stored[:, None] == codebook.codes[list(banned)]).all(-1).any()

    def test_a_weaker_one_is_not_pruned_again(self, lm, ids, codebook, banned):
        pruned = CodebookPatch(codebook=codebook, banned=banned, mode="prune")
        assert pruned.at(0.5).codebook is pruned.codebook
        assert torch.equal(stream(lm, ids, patch=pruned.at(0.5).at(1.0)), stream(lm, ids, patch=pruned))

    def test_it_cannot_take_a_difference(self, codebook, banned):
        with pytest.raises(InvalidConfig, match='use error="drop"'):
            CodebookPatch(codebook=codebook, banned=banned, mode="prune", error="keep")

    def test_a_gate_cannot_count_what_is_gone(self, codebook, banned):
        with pytest.raises(InvalidConfig, match="a sequence gate counts the banned codes, and this patch holds none"):
            CodebookPatch(codebook=codebook, banned=banned, mode="prune", gate=SequenceGate(above=0.1))


class TestLiveModels:
    @pytest.mark.parametrize("where", ["resid_pre", "attn_out", "mlp_out", "hook_z"])
    def test_every_stream_may_be_edited(self, any_lm, ids, where):
        site = Site(where, 1)
        codebook = make(site, sizes=(20, 20)).requires_grad_(False)  # two heads
        x = stream(any_lm, ids, site=site)
        found = stream(any_lm, ids, site=site, patch=CodebookPatch(codebook=codebook, banned=(3, 30)))
        assert torch.equal(found, codebook(x, (3, 30)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("error", ["drop", "keep"])
    def test_a_low_precision_model_is_edited_in_float32(self, ids, codebook, banned, dtype, error):
        lm = LM(make_hf().to(dtype), make_tokenizer())
        x = stream(lm, ids)
        found = stream(lm, ids, patch=CodebookPatch(codebook=codebook, banned=banned, error=error))
        assert found.dtype == dtype
        want = codebook(x.float(), banned)
        if error == "keep":
            want = x.float() + want - codebook(x.float())
        torch.testing.assert_close(found, want.to(dtype))

    def test_gradients_pass_and_reach_no_code(self, lm, ids):
        codebook = make()
        patch = CodebookPatch(codebook=codebook, banned=(1, 2))
        with patch.on(lm):
            lm.logits(ids).sum().backward()
        assert lm.model.model.embed_tokens.weight.grad.abs().sum() > 0
        assert all(p.grad is None for c in (codebook, patch.codebook) for p in c.parameters())
        assert all(p.requires_grad for p in codebook.parameters())

    def test_off_opens_no_hook_and_the_switch_turns_it_off_and_on(self, lm, ids, codebook, banned):
        patch, base = CodebookPatch(codebook=codebook, banned=banned), lm.logits(ids)
        with patch.at(0.0).on(lm):
            assert n_hooks(lm.model) == 0
        with patch.on(lm) as switch:
            on = lm.logits(ids)
            switch.enabled = False
            assert torch.equal(lm.logits(ids), base)
            switch.enabled = True
            assert torch.equal(lm.logits(ids), on)
        assert not torch.equal(on, base)

    def test_nothing_is_left_after_an_error(self, lm, ids, codebook, banned):
        before, base = {n: p.clone() for n, p in lm.model.named_parameters()}, lm.logits(ids)
        with CodebookPatch(codebook=codebook, banned=banned).on(lm), pytest.raises(IndexError):
            lm.logits(ids + 1000)
        assert n_hooks(lm.model) == 0
        assert torch.equal(lm.logits(ids), base)
        assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())

    def test_it_stacks_with_a_feature_patch(self, lm, ids, codebook, banned):
        codes = CodebookPatch(codebook=codebook, banned=banned)
        sae = make_sae("standard", hook_name="blocks.0.hook_resid_post")
        features = FeaturePatch(dictionary=sae, features=[1, 3], edit=Clamp(to=-3.0))
        base = lm.logits(ids)
        with features.on(lm), codes.on(lm):
            both = lm.logits(ids)
        with Stack((features, codes)).on(lm):
            assert torch.equal(lm.logits(ids), both)
        assert torch.equal(lm.logits(ids), base)


class TestSaved:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"mode": "zero", "strength": 0.5},
            {"mode": "prune"},
            {"error": "keep"},
            {"gate": SequenceGate(above=0.0)},
            {"gate": ProbeGate(above=-100.0), "sensor": SENSOR},
        ],
        ids=lambda s: "-".join(map(str, s)) or "plain",
    )
    def test_a_loaded_patch_does_the_same_to_the_last_bit(self, lm, ids, tmp_path, codebook, banned, settings):
        patch = CodebookPatch(codebook=codebook, banned=banned, **settings).met(lm, PROMPTS)
        patch.save(tmp_path / "patch")
        again = load_patch(tmp_path / "patch", lm)
        assert isinstance(again, CodebookPatch)
        assert again.spec() == patch.spec()
        assert torch.equal(stream(lm, ids, patch=again), stream(lm, ids, patch=patch))
        assert not torch.equal(stream(lm, ids, patch=again), stream(lm, ids))

    def test_another_base_is_refused(self, lm, tmp_path, codebook):
        folder = CodebookPatch(codebook=codebook).save(tmp_path / "patch", lm)
        with pytest.raises(PatchMismatch, match="made on tiny-llama"):
            load_patch(folder, LM(make_hf(seed=1), make_tokenizer(), name="other"))


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"banned": (40,)}, "has features 0 to 39; given: 40"),
            ({"banned": tuple(range(37))}, "leave 3 codes"),
            ({"mode": "skip"}, "mode is refill, zero or prune"),
            ({"error": "add"}, "error is drop or keep"),
            ({"strength": -1.0}, "strength"),
            ({"gate": TokenGate()}, "a token gate counts the banned codes"),
            ({"gate": ProbeGate(above=0.0), "sensor": replace(SENSOR, site=Site("resid_post", 2))}, "after the edit"),
        ],
        ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
    )
    def test_it_says_what_does_not_fit(self, codebook, settings, says):
        with pytest.raises(InvalidConfig, match=says):
            CodebookPatch(codebook=codebook, **settings)

    def test_a_codebook_of_another_width(self, lm, ids):
        patch = CodebookPatch(codebook=make(d_in=24))
        with (
            pytest.raises(DictionaryMismatch, match=r"reads 24 numbers a token; blocks\..* of this model has 16"),
            patch.on(lm),
        ):
            lm.logits(ids)
        assert n_hooks(lm.model) == 0


def test_a_sensor_of_codes_fires_where_they_are_chosen_and_weighs_what_they_write(codebook):
    x = torch.randn(5, D_MODEL)
    chosen = CodeSlice(codebook, (3, 7, 11))
    acts = chosen.encode(x).acts
    assert torch.equal(acts, codebook.encode(x)[..., [3, 7, 11]])
    torch.testing.assert_close(chosen.W_dec, codebook.codes[[3, 7, 11]] @ codebook.W_dec)
    assert (chosen.site, chosen.d_in, chosen.max_norm) == (SITE, D_MODEL, float("inf"))
