"""Adapters of several requests fused into one: each does on its own request's tokens what it did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import D_MODEL, make_hf, make_tokenizer
from patches.adapters import PROMPTS, SENSOR, SITES, draw, logits, make

from concept_unlearn.errors import EmptyData, InvalidConfig, PatchMismatch
from concept_unlearn.gates import ProbeGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.patches import AdapterPatch, FeaturePatch, fuse, load_patch
from concept_unlearn.patches.adapter import Linear
from concept_unlearn.patches.fusion import with_grams
from concept_unlearn.patches.inputs import inputs_of
from concept_unlearn.patches.refine import drawn
from concept_unlearn.patches.refine import error as missed_by
from concept_unlearn.weights.fusion import gram, with_ones

TEXTS = [[7, 8, 9, 10], [11, 12], [20, 21, 22, 23, 24, 25, 30], [40, 41, 42], [0, 33, 34]]
KINDS = ["bottleneck", "linear"]


def tensors(patch):
    return [t for name, t in patch.tensors().items() if not name.startswith("gram/")]


def assert_same(a, b, tolerance=1e-5):
    for one, other in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
class TestGrams:
    def test_they_are_of_what_comes_to_each_map_with_the_patch_on_and_no_padding(self, lm, kind):
        patch, sums = make(kind), {}
        for text in TEXTS:
            ids = torch.tensor([text])
            for site, adapter in patch.adapters.items():
                earlier = {s: a for s, a in patch.adapters.items() if s < site}
                with torch.no_grad(), lm.read(site) as found:
                    logits(lm, ids, AdapterPatch(adapters=earlier) if earlier else None)
                for name, x in adapter.inputs(found[site][ids != 0]).items():
                    sums[site, name] = sums.get((site, name), 0) + gram(with_ones(x))
        grams = with_grams(patch, lm, TEXTS).grams
        assert {(site, name) for site in grams for name in grams[site]} == sums.keys()
        for (site, name), expected in sums.items():
            torch.testing.assert_close(grams[site][name], expected, rtol=1e-4, atol=1e-3)
            n = int(expected[-1, -1])
            assert grams[site][name][-1, -1] == n == sum(len(t) for t in TEXTS) - 1

    def test_they_add_up_over_batches(self, lm, kind):
        parts = [with_grams(make(kind), lm, texts).grams for texts in (TEXTS[:2], TEXTS[2:])]
        whole = with_grams(make(kind), lm, TEXTS).grams
        for site, own in whole.items():
            for name, expected in own.items():
                torch.testing.assert_close(parts[0][site][name] + parts[1][site][name], expected, rtol=1e-4, atol=1e-3)

    def test_no_text_leaves_none(self, lm, kind):
        with pytest.raises(EmptyData, match="no text"):
            with_grams(make(kind), lm, [])


@pytest.mark.parametrize("kind", KINDS)
class TestFuse:
    def test_one_and_equal_patches_come_back_as_they_are(self, lm, kind):
        one, same = (with_grams(make(kind), lm, texts) for texts in (TEXTS[:3], TEXTS[3:]))
        assert_same(fuse([one]), one)
        assert_same(fuse([one, same]), one)

    def test_the_order_changes_nothing(self, lm, kind):
        patches = [with_grams(make(kind, seed=9 * i), lm, TEXTS[i : i + 2]) for i in range(3)]
        assert_same(fuse(patches), fuse(patches[::-1]), 1e-4)

    def test_what_was_fused_can_be_saved_and_fused_with_what_comes_later(self, lm, tmp_path, kind):
        patches = [with_grams(make(kind, seed=9 * i), lm, [*TEXTS, [15 + i, 16, 17, 18]]) for i in range(3)]
        first = load_patch(fuse(patches[:2]).save(tmp_path / "first", lm), lm)
        assert_same(fuse([first, patches[2]]), fuse(patches), 1e-3)

    def test_it_says_what_does_not_fit(self, lm, kind):
        patch = with_grams(make(kind), lm, TEXTS)
        other = with_grams(make(kind), LM(make_hf(seed=1), make_tokenizer(), name="other"), TEXTS)
        mixed = with_grams(make(KINDS[1 - KINDS.index(kind)]), lm, TEXTS)
        elsewhere = with_grams(make(kind, sites=[Site("mlp_out", 1)]), lm, TEXTS)
        for patches, error, says in [
            ([], InvalidConfig, "nothing to fuse"),
            ([patch, patch.without_grams()], InvalidConfig, "without Gram matrices"),
            ([patch, patch.at(0.5)], InvalidConfig, "as they were made"),
            ([replace(patch, gate=ProbeGate(above=0.0), sensor=SENSOR)], InvalidConfig, "without a gate"),
            ([patch, FeaturePatch(slices=(SENSOR,))], InvalidConfig, "given: FeaturePatch"),
            ([patch.met(lm), other.met(LM(make_hf(seed=1), make_tokenizer()))], PatchMismatch, "different models"),
            ([patch, mixed], PatchMismatch, "same sites, kinds and shapes"),
            ([patch, elsewhere], PatchMismatch, "same sites, kinds and shapes"),
        ]:
            with pytest.raises(error, match=says):
                fuse(patches)


def test_bottlenecks_of_unequal_widths_are_refused(lm):
    with pytest.raises(PatchMismatch, match=r"\(3, 16\).*\(4, 16\)"):
        fuse([with_grams(make(width=w), lm, TEXTS) for w in (3, 4)])


def plane(seed, lift):
    """Inputs in four of the sixteen directions, four for each seed; with a lift their span leaves the bias free."""
    basis = torch.linalg.qr(draw(D_MODEL, D_MODEL)).Q[4 * seed : 4 * seed + 4]
    x = draw(12, 4, seed=seed + 1)
    x[:, 0] = 1.0 if lift else x[:, 0]
    return x @ basis


def held(adapter, x):
    grams = {name: gram(with_ones(given)) for name, given in adapter.inputs(x).items()}
    return AdapterPatch(adapters={SITES[0]: adapter}, grams={SITES[0]: grams})


@pytest.mark.parametrize("lift", [True, False])
def test_linear_adapters_of_orthogonal_requests_each_do_what_they_did(lift):
    """Where the ones are a direction that the requests share, what they do there, their biases, must be one."""
    data, adapters = [plane(i, lift) for i in range(3)], []
    for i in range(3):
        bias = draw(D_MODEL, seed=30 + i if lift else 30)
        adapters.append(Linear.of({"map.weight": draw(D_MODEL, D_MODEL, seed=i), "map.bias": bias}))
    fused = fuse([held(a, x) for a, x in zip(adapters, data, strict=True)], ridge=0).adapters[SITES[0]]
    for adapter, x in zip(adapters, data, strict=True):
        torch.testing.assert_close(fused(x), adapter(x), rtol=0, atol=1e-4)
    assert (fused(data[0]) - adapters[1](data[0])).abs().max() > 0.1


def test_both_maps_of_a_bottleneck_are_least_squares_of_their_own(lm):
    """D with what comes to it, then U with what D_i makes of that."""
    patches = [with_grams(make(seed=9 * i, sites=SITES[:1], width=2), lm, TEXTS[2 * i : 2 * i + 2]) for i in range(2)]
    fused = fuse(patches).adapters[SITES[0]]
    for name in ("down", "up"):
        left = sum(p.grams[SITES[0]][name] for p in patches)
        maps = [p.adapters[SITES[0]].maps[name] for p in (*patches, AdapterPatch(adapters={SITES[0]: fused}))]
        *own, found = [torch.cat([m.weight.T, m.bias[None]]).double() for m in maps]
        right = sum(p.grams[SITES[0]][name] @ w for p, w in zip(patches, own, strict=True))
        assert (left @ found - right).norm() < 1e-3 * right.norm()


def test_a_fused_patch_is_a_patch_like_any_other(lm, ids):
    fused = fuse([with_grams(make(seed=9 * i), lm, TEXTS) for i in range(2)])
    with fused.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=4, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=4, chat=False, use_cache=False)
    assert torch.equal(logits(lm, ids, fused.at(0.0)), logits(lm, ids))


class TestRefined:
    """Both maps of a bottleneck together: towards what each request's adapter did on its own inputs."""

    def patches(self, lm):
        return [with_grams(make(seed=9 * i), lm, [*TEXTS[i::2], [15 + i, 16, 17, 18]]) for i in range(2)]

    def missed(self, fused, patches, inputs):
        counts = [float(p.grams[SITES[0]]["down"][-1, -1]) for p in patches]
        return [
            float(missed_by(fused.adapters[s], [p.adapters[s] for p in patches], [x[s] for x in inputs], counts))
            for s in SITES
        ]

    def test_it_misses_less_of_what_the_requests_did_and_never_more(self, lm):
        patches = self.patches(lm)
        inputs = [inputs_of(p, lm, [*TEXTS[i::2], [15 + i, 16, 17, 18]]) for i, p in enumerate(patches)]
        plain = self.missed(fuse(patches), patches, inputs)
        refined = self.missed(fuse(patches, refine=60, samples=inputs), patches, inputs)
        assert all(after < before / 2 for before, after in zip(plain, refined, strict=True))
        one_step = self.missed(fuse(patches, refine=1, samples=inputs), patches, inputs)
        assert all(after <= before for before, after in zip(plain, one_step, strict=True))

    def test_inputs_drawn_from_the_moments_help_on_the_inputs_themselves(self, lm):
        patches = self.patches(lm)
        inputs = [inputs_of(p, lm, [*TEXTS[i::2], [15 + i, 16, 17, 18]]) for i, p in enumerate(patches)]
        plain, drawn = (sum(self.missed(fuse(patches, refine=n), patches, inputs)) for n in (0, 60))
        assert drawn < plain

    def test_inputs_that_are_drawn_have_the_moments_they_were_drawn_from(self):
        x = draw(200, 5).double() @ draw(5, 5, seed=1).double() + 2
        found = drawn(gram(with_ones(x)), 200_000, seed=0)
        torch.testing.assert_close(found.mean(0), x.mean(0), rtol=0, atol=0.01)
        torch.testing.assert_close(found.T.cov(), x.T.cov(correction=0), rtol=0, atol=0.02)

    def test_inputs_are_what_the_gram_matrices_were_summed_over(self, lm):
        patch = with_grams(make(), lm, TEXTS)
        for site, x in inputs_of(patch, lm, TEXTS).items():
            torch.testing.assert_close(gram(with_ones(x)), patch.grams[site]["down"], rtol=1e-4, atol=1e-3)
        assert all(len(x) == 3 for x in inputs_of(patch, lm, TEXTS, n=3).values())

    def test_one_patch_equal_patches_and_linear_ones_come_back_as_they_are(self, lm):
        one, same = (with_grams(make(), lm, texts) for texts in (TEXTS[:3], TEXTS[3:]))
        assert_same(fuse([one], refine=20), one)
        assert_same(fuse([one, same], refine=20), one)
        linear = [with_grams(make("linear", seed=9 * i), lm, TEXTS) for i in range(2)]
        assert fuse(linear, refine=20).digest == fuse(linear).digest

    def test_it_is_the_same_each_time_and_can_be_fused_with_what_comes_later(self, lm):
        patches = self.patches(lm)
        one, again = (fuse(patches, refine=5) for _ in range(2))
        assert one.digest == again.digest
        assert len(fuse([one, with_grams(make(seed=4), lm, TEXTS)]).adapters) == len(SITES)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"refine": -1}, "0 or more; given: -1"),
            ({"samples": [{}, {}]}, "give refine=50"),
            ({"refine": 5, "samples": [{}]}, "one mapping a patch.*inputs_of"),
            ({"refine": 5, "samples": [{s: torch.zeros(0, D_MODEL) for s in SITES}] * 2}, "one mapping a patch"),
        ],
        ids=str,
    )
    def test_it_says_what_does_not_fit(self, lm, settings, says):
        with pytest.raises(InvalidConfig, match=says):
            fuse(self.patches(lm), **settings)
