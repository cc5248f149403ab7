"""Feature patches on live models: exactly what the formula says, exactly reversible, the same however it is run."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import D_MODEL, make_hf, make_sae, make_tokenizer, n_hooks, words

from concept_unlearn.dictionaries import SAEDictionary, direction
from concept_unlearn.edits import Clamp, DenseClamp, Mean, Refuse, Relative, Scale, Shift, Zero
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig, PatchNotReached, SiteNotFound
from concept_unlearn.gates import Always, ProbeGate, SequenceGate, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.patches import FeaturePatch, Stack

FEATURES = (1, 3)
EDITS = [Zero(), Scale(by=-6.0), Clamp(to=-3.0), Clamp(to=Relative(-0.5)), DenseClamp(to=-2.0), Shift(by=-1.0),
         Mean(values=(0.1, 0.2)), Refuse(to=3.0)]  # fmt: skip
PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40, 41, 42)]


def sensor(site="resid_post.1"):
    read = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    return direction(Site.parse(site), read, read, normalisation="constant_norm_rescale")


def gates(median):
    """Every gate, with thresholds at which some of the prompts open it and some do not."""
    return {
        "always": Always(),
        "token": TokenGate(above=median["token"]),
        "sequence": SequenceGate(above=median["sequence"]),
        "streaming": StreamingGate(above=median["streaming"], drift=0.5),
        "probe": ProbeGate(above=median["probe"]),
        "probe-max": ProbeGate(above=median["probe-max"], pool="max"),
        "probe-prompt": ProbeGate(above=median["probe-prompt"], prompt_only=True),
    }


@pytest.fixture(scope="module")
def sae():
    return SAEDictionary(make_sae("jumprelu", d_sae=40))


@pytest.fixture(scope="module")
def median(sae):
    """Of each gate's statistic over the prompts, so that about half of them open it."""
    from concept_unlearn.gates import Signal

    lm, found = LM(make_hf(), make_tokenizer()), {}
    for name, gate in gates(
        dict.fromkeys(("token", "sequence", "streaming", "probe", "probe-max", "probe-prompt"), 0.0)
    ).items():
        values = []
        for prompt in PROMPTS:
            ids = torch.tensor([lm.encode(prompt, chat=False)])
            mask = torch.ones_like(ids, dtype=torch.bool)
            x = lm.activations(ids, mask, Site("resid_post", 1))[Site("resid_post", 1)]
            acts = (sensor() if name.startswith("probe") else sae.slice(FEATURES)).encode(x).acts
            values += (
                acts.amax(-1).flatten().tolist()
                if gate.per_token
                else gate.statistic(Signal(acts, mask, mask)).tolist()
            )
        ordered = sorted(values)
        found[name] = (ordered[len(values) // 2 - 1] + ordered[len(values) // 2]) / 2
    return found


def patch_for(sae, edit, name, median):
    return FeaturePatch(
        dictionary=sae,
        features=FEATURES,
        edit=edit,
        gate=gates(median)[name],
        sensor=sensor() if "probe" in name else None,
    )


GATES = ["always", "token", "sequence", "streaming", "probe", "probe-max", "probe-prompt"]
EDITS_X_GATES = list(itertools.product(EDITS, GATES))


@pytest.mark.parametrize(("edit", "gate"), EDITS_X_GATES, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, sae, median, edit, gate):
    """Cached = uncached = batched = padded = one by one = static cache, and with beams."""
    patch = patch_for(sae, edit, gate, median)
    base = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    with patch.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
        assert together == [lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]
        assert together[::-1] == lm.generate(PROMPTS[::-1], max_new_tokens=8, chat=False, batch_size=2)
        ids = torch.tensor([lm.encode(p, chat=False)[:3] for p in (PROMPTS[0], PROMPTS[2], PROMPTS[3])])
        mask = torch.ones_like(ids)
        run = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        beams = lm.model.generate(ids, num_beams=3, use_cache=True, **run)
        assert torch.equal(beams, lm.model.generate(ids, num_beams=3, use_cache=False, **run))
        plain = lm.model.generate(ids, **run)
        assert torch.equal(plain, lm.model.generate(ids, cache_implementation="static", **run))
    if gate == "always":
        assert together != base
    assert lm.generate(PROMPTS, max_new_tokens=8, chat=False) == base


@pytest.mark.parametrize("gate", ["sequence", "streaming", "probe", "probe-max", "probe-prompt"])
def test_gates_of_these_tests_open_for_some_prompts_and_not_for_others(lm, sae, median, gate):
    patch = patch_for(sae, DenseClamp(to=-2.0), gate, median)
    changed = []
    for prompt in PROMPTS:
        ids = torch.tensor([lm.encode(prompt, chat=False)])
        base = lm.logits(ids)
        with patch.on(lm):
            changed.append(not torch.equal(lm.logits(ids), base))
    assert 0 < sum(changed) < len(PROMPTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(lm, sae, median, side):
    from concept_unlearn.data.encode import pad
    from concept_unlearn.lm.forward import forward

    rows = [lm.encode(p, chat=False) for p in PROMPTS]
    ids, mask = pad(rows, side=side)
    for name in gates(median):
        with torch.no_grad(), patch_for(sae, DenseClamp(to=-2.0), name, median).on(lm):
            together = forward(lm.model, ids, mask).logits
            for i, row in enumerate(rows):
                alone = lm.logits(torch.tensor([row]))[0]
                torch.testing.assert_close(together[i][mask[i]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["always", "sequence", "streaming", "probe"])
def test_scoring_answers_gates_on_the_prompt_alone(lm, sae, median, name):
    """An answer's own words never open a gate: its tokens score as if they had been generated one by one."""
    patch = patch_for(sae, DenseClamp(to=-2.0), name, median)
    prompts, answers = [lm.encode(p, chat=False) for p in PROMPTS], [[[7, 8, 9, 10], [20, 21]]] * len(PROMPTS)
    with torch.no_grad(), patch.on(lm):
        together = lm.score(prompts, answers)
        for prompt, group in zip(prompts, together, strict=True):
            for answer, found in zip(answers[0], group, strict=True):
                stepped, cache = [], None
                for step in [prompt, *[[t] for t in answer[:-1]]]:
                    out = lm.model(torch.tensor([step]), past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    stepped.append(out.logits[0, -1].log_softmax(-1)[answer[len(stepped)]])
                torch.testing.assert_close(found.logprobs, torch.stack(stepped), rtol=1e-4, atol=1e-4)


def test_the_formula_on_a_live_model(lm, ids):
    """x' = x + sum_i (t_i - a_i) W_dec[i], the dictionary's error term untouched."""
    sae = make_sae("standard").float()
    patch = FeaturePatch(dictionary=sae, features=FEATURES, edit=Clamp(to=-3.0))
    site = Site("resid_post", 1)
    with torch.no_grad():
        x = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site].double()
        acts = sae.double().encode(x)
        edited = acts.clone()
        chosen = list(FEATURES)
        edited[..., chosen] = torch.where(acts[..., chosen] > 0, -3.0, acts[..., chosen])
        want = x - sae.decode(acts) + sae.decode(edited)
        with patch.on(lm), lm.read(site) as seen:
            lm.logits(ids)
    torch.testing.assert_close(seen[site].double(), want, rtol=1e-4, atol=1e-4)


def test_a_relative_value_is_a_share_of_the_tokens_norm(lm, ids):
    """With one feature of any decoder norm, the residual moves by exactly that share."""
    patch = FeaturePatch(dictionary=make_sae("standard"), features=[4], edit=Shift(by=Relative(-0.25)))
    site = Site("resid_post", 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    x = lm.activations(ids, mask, site)[site]
    with patch.on(lm):
        moved = (lm.activations(ids, mask, site)[site] - x).norm(dim=-1)
    torch.testing.assert_close(moved, 0.25 * x.norm(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_relative_value_minds_the_dictionarys_scale(lm, ids, normalisation):
    sae = make_sae("standard", normalize_activations=normalisation)
    patch = FeaturePatch(dictionary=sae, features=[4], edit=Shift(by=Relative(-0.25)))
    site, mask = Site("resid_post", 1), torch.ones_like(ids, dtype=torch.bool)
    x = lm.activations(ids, mask, site)[site]
    with patch.on(lm):
        moved = (lm.activations(ids, mask, site)[site] - x).norm(dim=-1)
    torch.testing.assert_close(moved, 0.25 * x.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_a_dead_feature_and_untouched_tokens_are_bit_identical(lm, ids):
    sae = make_sae("standard")
    with torch.no_grad():
        sae.b_enc[[1, 2]] = -1e6
    base = lm.logits(ids)
    with FeaturePatch(dictionary=sae, features=[1, 2], edit=Clamp(to=-50.0)).on(lm):
        assert torch.equal(lm.logits(ids), base)


def test_bos_padding_and_sinks_are_never_edited(lm):
    from concept_unlearn.data.encode import pad

    site = Site("resid_post", 1)
    ids, mask = pad([[0, 7, 8, 9], [0, 10]], side="left")
    patch = FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=DenseClamp(to=-2.0))
    with torch.no_grad():
        with lm.read(site) as before:
            lm.logits(ids, mask)
        norms = before[site].norm(dim=-1)
        sink = float(norms[0, 1:].sort().values[1])
        bounded = FeaturePatch(
            slices=(direction(site, torch.ones(D_MODEL), torch.ones(D_MODEL), max_norm=sink),), edit=Shift(by=1.0)
        )
        for tried, extra in ((patch, torch.zeros_like(mask)), (bounded, norms > sink)):
            with tried.on(lm), lm.read(site) as after:
                lm.logits(ids, mask)
            changed = (after[site] != before[site]).any(-1)
            assert torch.equal(changed, mask & (ids != 0) & ~extra)


def test_the_first_of_several_cached_steps_is_not_mistaken_for_bos(lm):
    """Public code that zeroes "position 0" to skip BOS switches the edit off in every cached step."""
    site, edited = Site("resid_post", 1), []
    patch = FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=DenseClamp(to=-2.0))
    base = []
    with lm.edit({site: lambda x, _: base.append(x) or x}), patch.on(lm), lm.read(site) as seen:
        lm.model.register_forward_hook(lambda *_: edited.append(seen[site]))
        lm.model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, do_sample=False)
    assert [x.shape[1] for x in base] == [2, 1, 1, 1]
    assert all((a != b).any() for a, b in zip(base, edited, strict=True))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_is_exact_at_its_ends_and_linear_between(lm, ids, strength):
    site, mask = Site("resid_post", 1), torch.ones_like(ids, dtype=torch.bool)
    patch = FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=Clamp(to=-3.0))
    x = lm.activations(ids, mask, site)[site]
    with patch.on(lm):
        full = lm.activations(ids, mask, site)[site]
    with patch.at(strength).on(lm):
        found = lm.activations(ids, mask, site)[site]
    if strength in (0.0, 1.0):
        assert torch.equal(found, full if strength else x)
    torch.testing.assert_close(found, x + strength * (full - x), rtol=1e-5, atol=1e-5)


def test_off_opens_no_hook(lm, ids):
    with FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, strength=0.0).on(lm):
        assert n_hooks(lm.model) == 0


def test_the_switch_turns_it_off_and_on_again(lm, ids):
    patch = FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=Clamp(to=-3.0))
    base = lm.logits(ids)
    with patch.on(lm) as switch:
        on = lm.logits(ids)
        switch.enabled = False
        assert torch.equal(lm.logits(ids), base)
        switch.enabled = True
        assert torch.equal(lm.logits(ids), on)
    assert not torch.equal(on, base)


def test_nested_patches_unwind_in_any_order_and_after_errors(lm, ids):
    sae = make_sae("standard")
    a = FeaturePatch(dictionary=sae, features=[1, 2], edit=Clamp(to=-3.0))
    b = FeaturePatch(dictionary=sae, features=[3, 5], edit=Clamp(to=-3.0))
    base = lm.logits(ids)
    first, second = a.on(lm), b.on(lm)
    first.__enter__()
    alone = lm.logits(ids)
    second.__enter__()
    both = lm.logits(ids)
    first.__exit__(None, None, None)
    assert not torch.equal(lm.logits(ids), both)
    second.__exit__(None, None, None)
    assert torch.equal(lm.logits(ids), base)
    with a.on(lm), b.on(lm), pytest.raises(RuntimeError):
        raise RuntimeError
    assert torch.equal(lm.logits(ids), base)
    assert n_hooks(lm.model) == 0
    with Stack((a, b)).on(lm):
        assert torch.equal(lm.logits(ids), both)
    with Stack((a, b), strength=0.0).on(lm):
        assert torch.equal(lm.logits(ids), base)
    with Stack((a,)).on(lm) as switch:
        assert torch.equal(lm.logits(ids), alone)
        switch.enabled = False
        assert torch.equal(lm.logits(ids), base)


def test_several_sites_share_one_gate(lm, ids):
    """The gate decides at the shallowest site, before any edit, and holds at the deeper ones."""
    saes = [make_sae("standard", seed=i, hook_name=f"blocks.{i}.hook_resid_post") for i in (0, 1, 2)]
    closed = FeaturePatch(
        dictionary=saes, features=[FEATURES] * 3, edit=DenseClamp(to=-2.0), gate=SequenceGate(above=1.0)
    )
    opened = FeaturePatch(
        dictionary=saes, features=[FEATURES] * 3, edit=DenseClamp(to=-2.0), gate=SequenceGate(above=0.0)
    )
    base = lm.logits(ids)
    with closed.on(lm):
        assert torch.equal(lm.logits(ids), base)
    with opened.on(lm):
        assert not torch.allclose(lm.logits(ids), base)
        assert lm.generate(PROMPTS, chat=False, max_new_tokens=6) == lm.generate(
            PROMPTS, chat=False, max_new_tokens=6, use_cache=False
        )


def test_a_transcoder_is_read_at_one_site_and_written_at_another(lm, ids):
    sae = make_sae(
        "transcoder", d_out=D_MODEL, hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out"
    ).float()
    patch = FeaturePatch(dictionary=sae, features=FEATURES, edit=Scale(by=0.0))
    mask, read, written = torch.ones_like(ids, dtype=torch.bool), Site("mlp_in", 1), Site("mlp_out", 1)
    before = lm.activations(ids, mask, read, written)
    with patch.on(lm):
        after = lm.activations(ids, mask, written)[written]
    acts = sae.double().encode(before[read].double())[..., list(FEATURES)]
    want = before[written].double() - acts @ sae.W_dec[list(FEATURES)]
    torch.testing.assert_close(after.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stream", ["resid_pre", "attn_out", "mlp_out", "hook_z"])
def test_every_stream_may_be_edited(any_lm, ids, stream):
    sae = make_sae("standard", hook_name=str(Site(stream, 1)))
    base = any_lm.logits(ids)
    with FeaturePatch(dictionary=sae, features=FEATURES, edit=DenseClamp(to=-2.0)).on(any_lm):
        assert not torch.allclose(any_lm.logits(ids), base)
    assert torch.equal(any_lm.logits(ids), base)


def test_cached_equals_uncached_on_every_library(any_lm, sae, median):
    for name in ("always", "sequence", "streaming", "probe"):
        with patch_for(sae, DenseClamp(to=-2.0), name, median).on(any_lm):
            cached = any_lm.generate(PROMPTS, max_new_tokens=6, chat=False)
            assert cached == any_lm.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)
            assert cached == [any_lm.generate(p, max_new_tokens=6, chat=False)[0] for p in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_takes_a_float32_dictionary(ids, dtype):
    lm = LM(make_hf().to(dtype), make_tokenizer())
    base = lm.logits(ids)
    with FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=Clamp(to=-3.0)).on(lm):
        patched = lm.logits(ids)
    assert patched.dtype == dtype
    assert not torch.equal(patched, base)
    assert torch.equal(lm.logits(ids), base)


def test_gradients_flow_through_an_edit(lm, ids):
    with FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=Scale(by=-2.0)).on(lm):
        lm.logits(ids).sum().backward()
    assert lm.model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    def test_patch_first_then_compile_and_switch_without_recompiling(self, lm, ids):
        patch = FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, edit=Clamp(to=-3.0))
        with torch.no_grad():
            base = lm.logits(ids)
            with patch.on(lm) as switch:
                want = lm.logits(ids)
                frames = []
                compiled = torch.compile(lm.model, backend=lambda graph, _: frames.append(1) or graph.forward)
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)
                n_frames = len(frames)
                switch.enabled = False
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, base)
                switch.enabled = True
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)
                assert len(frames) == n_frames > 0


class TestBadInput:
    def test_a_dictionary_of_another_width(self, lm, ids):
        patch = FeaturePatch(dictionary=make_sae("standard", d_in=24), features=FEATURES)
        with (
            pytest.raises(DictionaryMismatch, match=r"reads 24 numbers a token; blocks\..* of this model has 16"),
            patch.on(lm),
        ):
            lm.logits(ids)
        assert n_hooks(lm.model) == 0

    def test_a_site_that_the_model_lacks(self, lm):
        patch = FeaturePatch(dictionary=make_sae("standard", hook_name="blocks.9.hook_resid_post"), features=FEATURES)
        with pytest.raises(SiteNotFound, match="layers 0 to 2"), patch.on(lm):
            pass

    def test_nothing_to_edit(self):
        with pytest.raises(InvalidConfig, match="needs dictionary"):
            FeaturePatch()
        with pytest.raises(InvalidConfig, match="no feature"):
            FeaturePatch(dictionary=make_sae("standard"), features=[])
        with pytest.raises(InvalidConfig, match="2 dictionaries need as many lists"):
            FeaturePatch(dictionary=[make_sae("standard")] * 2, features=[[1]])

    def test_a_sensor_after_the_edit(self):
        with pytest.raises(InvalidConfig, match="computes after the edit"):
            FeaturePatch(
                dictionary=make_sae("standard"),
                features=FEATURES,
                gate=ProbeGate(above=0.0),
                sensor=sensor("resid_post.2"),
            )

    def test_a_negative_strength(self):
        with pytest.raises(InvalidConfig, match="strength"):
            FeaturePatch(dictionary=make_sae("standard"), features=FEATURES, strength=-1.0)

    def test_a_cache_that_changed_its_rows_unseen(self, lm):
        from transformers import DynamicCache

        patch = FeaturePatch(
            dictionary=make_sae("standard"), features=FEATURES, edit=DenseClamp(to=-2.0), gate=SequenceGate(above=0.1)
        )
        with patch.on(lm):
            cache = lm.model(torch.tensor([[7, 8], [9, 10]]), use_cache=True).past_key_values
            assert isinstance(cache, DynamicCache)
            cache.batch_repeat_interleave(2)
            with pytest.raises(PatchNotReached, match="from 2 to 4 sequences"):
                lm.model(torch.tensor([[7]] * 4), past_key_values=cache)
