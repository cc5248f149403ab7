"""Every published recipe is a row that parses, fits and does what its row says."""

from __future__ import annotations

import pytest
import torch
from conftest import PLANTED

from concept_unlearn.errors import UnknownName
from concept_unlearn.methods import PRESETS, Method, preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_its_row(name):
    made = preset(name, "a", "b")
    spec = made.spec()
    assert spec["dictionaries"] == ["a", "b"]
    for key, row in PRESETS[name].items():
        assert spec[key] == row if key == "n" else row.items() <= spec[key].items()
    assert Method.parse(spec) == made


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_fits_and_changes_text_about_the_concept(planted, name):
    refusal = {"refusal_features": (20,)} if name == "refusal_clamp" else {}
    method = preset(name, planted.first).model_copy(update={"n": 2, **refusal})
    patch = method(planted.lm, planted.scope)
    assert set(patch.slices[0].features[:2]) == set(PLANTED)
    assert getattr(patch.gate, "above", 0.0) is not None
    ids = torch.tensor([planted.lm.encode(p.text, chat=False) for p in planted.scope.forget[:4]])
    with torch.no_grad(), patch.on(planted.lm):
        patched = planted.lm.logits(ids)
    assert not torch.allclose(planted.lm.logits(ids), patched)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UnknownName, match=r"no preset named 'dgs'; known: clamp_prime, .*Did you mean 'dsg'\?"):
        preset("dgs", "a")
