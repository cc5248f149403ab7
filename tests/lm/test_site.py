from __future__ import annotations

import pytest

from concept_unlearn.component import Frozen, build
from concept_unlearn.errors import SiteNotFound
from concept_unlearn.lm import Site
from concept_unlearn.lm.site import STREAMS


@pytest.mark.parametrize("stream", STREAMS)
def test_names_round_trip(stream):
    site = Site(stream, 7)
    assert Site.parse(str(site)) == site
    assert Site.parse(f"{stream}.7") == site
    assert Site.parse(site) is site


def test_transformer_lens_names_are_the_vocabulary():
    assert str(Site("resid_post", 14)) == "blocks.14.hook_resid_post"
    assert Site.parse("blocks.3.attn.hook_z") == Site("hook_z", 3)
    assert Site.parse("blocks.3.mlp.hook_in") == Site("mlp_in", 3)


@pytest.mark.parametrize("name", ["blocks.x.hook_resid_post", "resid_post", "blocks.1.hook_nonsense", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(SiteNotFound, match=r"known: blocks\.<layer>\.hook_resid_pre"):
        Site.parse(name)


def test_sites_sort_as_the_model_computes_them():
    names = [
        "resid_pre.0",
        "attn_out.0",
        "mlp_in.0",
        "resid_post.0",
        "resid_pre.1",
        "hook_z.1",
        "mlp_out.1",
        "resid_post.1",
    ]
    sites = [Site.parse(n) for n in names]
    assert sorted(set(sites)) == sites


def test_a_site_is_a_string_in_a_config():
    class Holder(Frozen):
        site: Site

    made = build(Holder, {"site": "resid_post.2"})
    assert made.site == Site("resid_post", 2)
    assert made.model_dump(mode="json") == {"site": "blocks.2.hook_resid_post"}
    assert Holder.model_json_schema()["properties"]["site"]["type"] == "string"
