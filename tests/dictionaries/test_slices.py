"""A slice of k columns is SAELens' own full path, to rounding, for every architecture that allows it."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import D_MODEL, make_sae

from concept_unlearn.dictionaries import ColumnSlice, SAEDictionary, as_dictionary
from concept_unlearn.dictionaries.sae import WholeSlice, certificate, restore_slice
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig, NotExact, SiteNotFound
from concept_unlearn.lm import Site

FEATURES = [3, 17, 0, 39]
EXACT = ["standard", "jumprelu", "gated"]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
WHOLE = [
    ("topk", {"k": 5}),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ("abstopk", {"k": 5}),
    ("matching_pursuit", {"max_iterations": 6}),
]
REFUSED = {"batchtopk", "matryoshka_batchtopk", "temporal"}
MODES = [
    {"apply_b_dec_to_input": b, "normalize_activations": n}
    for b in (False, True)
    for n in ("none", "layer_norm", "constant_norm_rescale")
]
X = torch.randn(2, 50, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def full_delta(sae, targets, by_head=False):
    """What a clamp does by SAELens' full path: decode(f') - decode(f), with f' = f but for the targets."""
    x = X.unsqueeze(-2) if by_head else X
    acts = sae.encode(x)
    before = sae.decode(acts.clone())
    sae.encode(x)  # SAELens keeps the scale of the last input and forgets it when it decodes
    edited = acts.clone()
    edited[..., FEATURES] = targets
    delta = sae.decode(edited) - before
    return acts, delta.squeeze(-2) if by_head else delta


def slice_delta(chosen, targets):
    acts, scale = chosen.encode(X)
    change = targets.float() - acts
    return acts, (change if scale is None else change * scale) @ chosen.W_dec


def assert_same(found, want):
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("architecture", EXACT)
def test_k_columns_equal_the_full_path(architecture, mode):
    sae = make_sae(architecture, **mode)
    chosen = SAEDictionary(sae).slice(FEATURES)
    targets = torch.randn(2, 50, len(FEATURES), dtype=torch.float64)
    acts, delta = full_delta(sae, targets)
    found_acts, found_delta = slice_delta(chosen, targets)
    assert isinstance(chosen, ColumnSlice)
    assert (found_acts > 0).any()
    assert_same(found_acts, acts[..., FEATURES])
    assert_same(found_delta, delta)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
def test_folds_are_exact_in_double_precision(mode):
    """The identity behind the slice holds to 1e-12, so what differs above is float32 alone."""
    sae = make_sae("standard", **mode)
    chosen = SAEDictionary(sae).slice(FEATURES)
    x = X - X.mean(-1, keepdim=True) if mode["normalize_activations"] == "layer_norm" else X
    scale = {
        "none": torch.ones(()),
        "layer_norm": 1 / (x.std(-1, keepdim=True) + 1e-5),
        "constant_norm_rescale": D_MODEL**0.5 / x.norm(dim=-1, keepdim=True),
    }[mode["normalize_activations"]]
    pre = (x * scale) @ sae.W_enc[:, FEATURES] + sae.b_enc[FEATURES]
    if mode["apply_b_dec_to_input"]:
        pre = pre - sae.b_dec @ sae.W_enc[:, FEATURES]
    torch.testing.assert_close(pre.relu(), sae.encode(X)[..., FEATURES], rtol=1e-12, atol=1e-12)
    assert_same(chosen.encode(X).acts, pre.relu())


@torch.no_grad()
@pytest.mark.parametrize("architecture", EXACT)
def test_hook_z_dictionaries_take_flattened_heads(architecture):
    sae = make_sae(
        architecture, hook_name="blocks.1.attn.hook_z", reshape_activations="hook_z", apply_b_dec_to_input=True
    )
    dictionary = SAEDictionary(sae)
    targets = torch.randn(2, 50, len(FEATURES), dtype=torch.float64)
    acts, delta = full_delta(sae, targets, by_head=True)
    assert dictionary.site == Site("hook_z", 1)
    assert_same(dictionary.encode(X), acts)
    found_acts, found_delta = slice_delta(dictionary.slice(FEATURES), targets)
    assert_same(found_acts, acts[..., FEATURES])
    assert_same(found_delta, delta)


@torch.no_grad()
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_read_one_site_and_write_another(architecture, normalisation):
    sae = make_sae(
        architecture, d_out=12, normalize_activations=normalisation,
        hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out",
    )  # fmt: skip
    chosen = SAEDictionary(sae).slice(FEATURES)
    targets = torch.randn(2, 50, len(FEATURES), dtype=torch.float64)
    acts, delta = full_delta(sae, targets)
    found_acts, found_delta = slice_delta(chosen, targets)
    assert (chosen.site, chosen.site_out) == (Site("mlp_in", 1), Site("mlp_out", 1))
    assert_same(found_acts, acts[..., FEATURES])
    assert_same(found_delta, delta)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize(("architecture", "settings"), WHOLE, ids=lambda v: str(v))
def test_features_that_compete_are_encoded_whole(architecture, settings, mode):
    sae = make_sae(architecture, **settings, **mode).to(dtype=torch.float32)
    chosen = SAEDictionary(sae).slice(FEATURES)
    targets = torch.randn(2, 50, len(FEATURES))
    acts, delta = full_delta(sae, targets)
    found_acts, found_delta = slice_delta(chosen, targets)
    assert isinstance(chosen, WholeSlice)
    assert_same(found_acts, acts[..., FEATURES])
    assert_same(found_delta, delta)


@torch.no_grad()
def test_topk_encodes_only_rows_that_a_chosen_feature_could_win(monkeypatch):
    sae = make_sae("topk", k=5).to(dtype=torch.float32)
    dictionary = SAEDictionary(sae)
    chosen = dictionary.slice([3])
    seen = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: seen.append(x.reshape(-1, D_MODEL).shape[0]) or encode(x))
    acts = chosen.encode(X).acts
    live = int((chosen.columns.encode(X).acts > 0).sum())
    assert seen == [live]
    assert 0 < live < 100
    assert_same(acts, encode(X.float())[..., [3]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_topk_saved_for_inference_is_exact(kind, tmp_path):
    sae = make_training_sae(kind)
    sae.save_inference_model(str(tmp_path))
    from sae_lens import SAE

    saved = SAE.load_from_disk(tmp_path, dtype="float64")
    assert saved.cfg.architecture() == "jumprelu"
    targets = torch.randn(2, 50, len(FEATURES), dtype=torch.float64)
    acts, delta = full_delta(saved, targets)
    found_acts, found_delta = slice_delta(SAEDictionary(saved).slice(FEATURES), targets)
    assert_same(found_acts, acts[..., FEATURES])
    assert_same(found_delta, delta)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_dependent_training_classes_are_refused(kind):
    with pytest.raises(NotExact, match="save it for inference"):
        SAEDictionary(make_training_sae(kind)).slice([1])


def test_temporal_dictionaries_are_refused():
    sae = make_sae("temporal", n_heads=2, bottleneck_factor=4, kval_topk=3, apply_b_dec_to_input=True)
    with pytest.raises(NotExact, match="earlier tokens"):
        SAEDictionary(sae).slice([1])


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(NotExact, match="known: standard, jumprelu"):
        certificate("quantum")


def test_every_architecture_of_sae_lens_is_certified_or_refused_by_name():
    import sae_lens  # noqa: F401
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    for architecture in {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}:
        if architecture in REFUSED:
            with pytest.raises(NotExact, match=r"neighbours in it|earlier tokens"):
                certificate(architecture)
        else:
            assert certificate(architecture).reason


@pytest.mark.parametrize("features", [[], [40], [-1], [1, 1]])
def test_bad_features_are_named(features):
    with pytest.raises(InvalidConfig):
        SAEDictionary(make_sae()).slice(features)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "transcoder", "topk"])
def test_a_slice_survives_being_saved(architecture):
    settings = {"k": 5} if architecture == "topk" else {"d_out": D_MODEL} if architecture == "transcoder" else {}
    chosen = SAEDictionary(make_sae(architecture, **settings).to(dtype=torch.float32)).slice(FEATURES)
    again = restore_slice(chosen.spec(), chosen.tensors())
    assert again.spec() == chosen.spec()
    assert torch.equal(again.encode(X.float()).acts, chosen.encode(X.float()).acts)
    assert torch.equal(again.W_dec, chosen.W_dec)


def test_a_sae_lens_sae_is_taken_as_it_is_and_anything_else_refused():
    dictionary = as_dictionary(make_sae())
    assert as_dictionary(dictionary) is dictionary
    assert (dictionary.n_features, dictionary.d_in) == (40, D_MODEL)
    with pytest.raises(DictionaryMismatch, match="neither"):
        as_dictionary(3)


def test_a_site_is_needed_and_may_be_overridden():
    sae = make_sae(hook_name="")
    with pytest.raises(DictionaryMismatch, match="site="):
        SAEDictionary(sae)
    assert SAEDictionary(sae, site="resid_pre.2").site == Site("resid_pre", 2)
    with pytest.raises(SiteNotFound, match="known"):
        SAEDictionary(sae, site="somewhere")


def test_an_encoding_computes_in_float32_whatever_it_is_given():
    chosen = SAEDictionary(make_sae()).slice(FEATURES)
    assert chosen.encode(X.bfloat16()).acts.dtype == torch.float32


def make_training_sae(kind):
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(kind)
    settings = {"matryoshka_widths": [10, 40]} if kind.startswith("matryoshka") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_class(config_class(d_in=D_MODEL, d_sae=40, k=4, dtype="float64", **settings))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        sae.topk_threshold.fill_(0.3)
    return sae
