"""Patches of parts united: every feature or code that one of them edits, once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_hf, make_sae, make_tokenizer

from concept_unlearn.dictionaries import direction
from concept_unlearn.dictionaries.load import load_dictionary
from concept_unlearn.edits import Clamp, Mean, Refuse, Scale
from concept_unlearn.errors import InvalidConfig, PatchMismatch
from concept_unlearn.gates import TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.patches import CodebookPatch, FeaturePatch
from concept_unlearn.patches.union import union

ARCHITECTURES = ["standard", "jumprelu", "gated", "topk"]


def edits(*lists, sae=None, **settings):
    sae = make_sae() if sae is None else sae
    return [FeaturePatch(dictionary=sae, features=features, **{"edit": Clamp(to=3.0)} | settings) for features in lists]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_union_of_features_is_the_patch_of_all_of_them(architecture):
    sae = make_sae(architecture, **({"k": 6} if architecture == "topk" else {}))
    whole = FeaturePatch(dictionary=sae, features=(2, 5, 7, 11), edit=Clamp(to=3.0))
    found = union(edits((7, 2), (5, 2), (11,), sae=sae))
    assert found.digest == whole.digest


def test_the_order_and_repetitions_change_nothing():
    parts = edits((1, 2), (2, 3), (9,))
    assert union(parts).digest == union([*parts[::-1], parts[1]]).digest
    assert union(parts[:1]).digest == parts[0].digest


def test_sites_stand_side_by_side():
    saes = [make_sae(hook_name=f"blocks.{i}.hook_resid_post", seed=i) for i in (0, 1)]
    one, two = (edits((1 + i, 4), sae=sae)[0] for i, sae in enumerate(saes))
    both = union([two, one, edits((8,), sae=saes[0])[0]])
    assert [(str(s.site), s.features) for s in both.slices] == [
        ("blocks.0.hook_resid_post", (1, 4, 8)), ("blocks.1.hook_resid_post", (2, 4)),
    ]  # fmt: skip


def test_means_go_with_their_features_and_the_refusal_stays_the_last():
    sae = make_sae()
    one, two = (
        FeaturePatch(dictionary=sae, features=f, edit=Mean(values=v))
        for f, v in (((4, 1), (0.4, 0.1)), ((2, 4), (0.2, 0.4)))
    )
    found = union([one, two])
    assert found.slices[0].features == (1, 2, 4)
    assert found.edit == Mean(values=(0.1, 0.2, 0.4))
    refusing = union(edits((4, 1, 3), (2, 3), sae=sae, edit=Refuse(to=2.0)))
    assert refusing.slices[0].features == (1, 2, 4, 3)


def test_it_edits_what_either_edits_as_it_would(lm, ids):
    """Features that never fire together in a residual of their own: each part's effect is in the union's."""
    one, two = edits((3,), (8,), edit=Clamp(to=0.0))
    site = one.slices[0].site
    with torch.no_grad(), lm.read(site) as seen:
        lm.logits(ids)
    x = seen[site]
    changed = []
    for patch in (one, two, union([one, two])):
        with torch.no_grad(), patch.on(lm), lm.read(site) as after:
            lm.logits(ids)
        changed.append(after[site] - x)
    torch.testing.assert_close(changed[2], changed[0] + changed[1], rtol=1e-4, atol=1e-5)
    assert changed[2].abs().max() > 0.1


@pytest.mark.parametrize("mode", ["refill", "zero"])
def test_the_union_of_bans_is_the_patch_that_bans_all_of_them(codes, mode, lm, tmp_path):
    codebook = load_dictionary(codes)
    parts = [CodebookPatch(codebook=codebook, banned=b, mode=mode) for b in ((30, 31), (31, 40))]
    again = CodebookPatch.restore(parts[1].spec(), parts[1].tensors(), None)  # as it comes back from disk
    assert union([parts[0], again]).digest == CodebookPatch(codebook=codebook, banned=(30, 31, 40), mode=mode).digest


def test_it_says_what_does_not_fit(codes, lm):
    codebook = load_dictionary(codes)
    ban = CodebookPatch(codebook=codebook, banned=(30,))
    other = codebook.frozen()
    with torch.no_grad():
        other.codes[0] += 1
    one, two = edits((1, 2), (2, 3))
    elsewhere = edits((1, 2), sae=make_sae(seed=5))[0]
    another = LM(make_hf(seed=1), make_tokenizer())
    steering = [
        FeaturePatch(slices=(direction(Site("resid_pre", 1), torch.randn(16), torch.ones(16)),)) for _ in range(2)
    ]
    for patches, error, says in [
        ([], InvalidConfig, "nothing to unite"),
        ([one, ban], InvalidConfig, "not CodebookPatch, FeaturePatch"),
        ([one, two.at(0.5)], InvalidConfig, "at strength 1"),
        ([one, replace(two, gate=TokenGate(above=1.0))], InvalidConfig, "one gate"),
        ([one, replace(two, edit=Scale(by=-2.0))], InvalidConfig, "one edit.*clamp.*scale"),
        ([one, elsewhere], PatchMismatch, "feature 2 .* is not the same|feature 1 .* is not the same"),
        ([one, edits((1,), sae=make_sae("jumprelu"))[0]], PatchMismatch, "different dictionaries"),
        (steering, PatchMismatch, "directions of no dictionary"),
        ([one.met(lm), two.met(another)], PatchMismatch, "different models"),
        (edits((1, 2), (3, 4), edit=Refuse()), InvalidConfig, r"one feature of each dictionary; given: \[2, 4\]"),
        ([ban, CodebookPatch(codebook=codebook, banned=(31,), mode="zero")], InvalidConfig, "bans of one mode"),
        ([CodebookPatch(codebook=codebook, banned=(31,), mode="prune")] * 2, InvalidConfig, "prune the union"),
        ([ban, CodebookPatch(codebook=other, banned=(31,))], PatchMismatch, "different codebooks"),
    ]:
        with pytest.raises(error, match=says):
            union(patches)
