"""A dictionary is found by its name, computes what it was saved with, and a broken or foreign one is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import D_MODEL, make_sae

from concept_unlearn.dictionaries import load_dictionary, shipped
from concept_unlearn.dictionaries.load import ASSETS
from concept_unlearn.errors import CorruptArtifact, DictionaryMismatch, NotExact, SiteNotFound, UnknownName
from concept_unlearn.lm import Site
from concept_unlearn.methods import Suppress

X = torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    make_sae("jumprelu").save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize(
    ("architecture", "settings"), [("standard", {}), ("jumprelu", {}), ("gated", {}), ("topk", {"k": 5})]
)
def test_a_saelens_folder_computes_what_it_was_saved_with(tmp_path, architecture, settings):
    sae = make_sae(architecture, **settings)
    sae.save_model(tmp_path / "sae")
    found = load_dictionary(tmp_path / "sae")
    assert (found.name, found.site, found.n_features, found.d_in) == ("sae", Site("resid_post", 1), 40, D_MODEL)
    acts = sae.encode(X.double())
    assert (acts > 0).any()
    torch.testing.assert_close(found.encode(X), acts.float())
    torch.testing.assert_close(found.decode(acts.float(), X), sae.decode(acts).float())


def test_a_site_that_is_given_overrides_the_recorded_one(folder):
    assert load_dictionary(str(folder), site="resid_pre.2").site == Site("resid_pre", 2)
    with pytest.raises(SiteNotFound, match="known"):
        load_dictionary(folder, site="resid_pst.2")


def test_a_dictionary_that_names_no_site_needs_one(tmp_path):
    make_sae("standard", hook_name="").save_model(tmp_path / "sae")
    with pytest.raises(DictionaryMismatch, match="does not say which site"):
        load_dictionary(tmp_path / "sae")
    assert load_dictionary(tmp_path / "sae", site="resid_pre.2").site == Site("resid_pre", 2)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_name_is_a_model_and_the_site_it_reads(name):
    found = load_dictionary(name)
    assert found.name == name
    assert str(found.site) == name.split("/")[1]
    assert found.encode(torch.randn(4, found.d_in)).shape == (4, found.n_features)
    assert found.max_norm < float("inf")
    card = (ASSETS / name / "README.md").read_text()
    assert all(word in card for word in ("variance explained", "L0", "never fire", "loss recovered"))
    assert sum(path.stat().st_size for path in (ASSETS / name).iterdir()) < 20e6


def test_three_sites_are_shipped():
    assert len({name.split("/")[1] for name in shipped()}) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no dictionary named 'nowhere'; known: .*gpt2-small-res-jb"),
        ("smollm2/blocks.8.hook_resid_post", r"Did you mean 'smollm2/blocks\.\d+\.hook_resid_post'"),
        ("gpt2-small-res-jp", "Did you mean 'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb/blocks.7", "no SAE in release gpt2-small-res-jb named 'blocks.7'; known: blocks.0.hook"),
    ],
)  # fmt: skip
def test_an_unknown_name_says_what_is_known(name, says):
    with pytest.raises(UnknownName, match=says):
        load_dictionary(name)


def damage(folder, how):
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    fields = json.loads(config.read_text())
    match how:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-40])
        case "garbled header":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        case "empty weights":
            weights.write_bytes(b"")
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "truncated config":
            config.write_text(config.read_text()[:-20])
        case "config of another width":
            config.write_text(json.dumps(fields | {"d_sae": 41}))
        case "config without a width":
            del fields["d_in"]
            config.write_text(json.dumps(fields))
        case "config that is no mapping":
            config.write_text("[]")


DAMAGES = [
    "truncated weights", "garbled header", "empty weights", "no weights", "no config", "truncated config",
    "config of another width", "config without a width", "config that is no mapping",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_one_clear_error(folder, how):
    damage(folder, how)
    with pytest.raises(CorruptArtifact, match=str(folder)):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [("batchtopk", "save it for inference"), ("temporal", "attends over earlier tokens"), ("magic", "known: standard")],
)
def test_an_architecture_that_no_edit_is_exact_for_is_refused(folder, architecture, says):
    config = folder / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": architecture}))
    with pytest.raises(NotExact, match=says):
        load_dictionary(folder)


@pytest.mark.parametrize(("d_in", "says"), [(24, "reads 24 numbers a token; .* has 16"), (D_MODEL, "explains -")])
def test_a_dictionary_of_another_model_is_refused_when_it_is_used(planted, tmp_path, d_in, says):
    make_sae("standard", d_in=d_in).save_model(tmp_path / "sae")
    with pytest.raises(DictionaryMismatch, match=says):
        Suppress(dictionaries=(str(tmp_path / "sae"),))(planted.lm, planted.scope)
