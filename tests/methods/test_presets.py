"""Every published recipe is a row that parses, fits and does what its row says."""

from __future__ import annotations

import pytest
import torch
from conftest import PLANTED

from concept_unlearn.errors import UnknownName
from concept_unlearn.methods import PRESETS, Method, preset

EDITING = sorted(name for name, row in PRESETS.items() if row["kind"] == "suppress")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_its_row(name):
    made = preset(name, "a", "b") if name in (*EDITING, "crisp") else preset(name)
    spec = made.spec()
    for key, row in PRESETS[name].items():
        assert _within(row, spec[key])
    assert Method.parse(spec) == made


def test_a_closer_look_at_its_published_settings():
    for name, weight, lr in [("me_gd", 0.1, 1e-5), ("me_gd_continual", 1.0, 1e-5), ("me_gd_real_world", 0.5, 5e-6)]:
        made = preset(name)
        assert [(o.kind, o.weight) for o in made.objectives] == [("me", weight), ("retain_nll", 1.0)]
        assert (made.lr, made.epochs, made.batch_size, made.warm_up, made.weight_decay) == (lr, 5, 32, 1, 0.01)
    refusing, preserving = preset("idk_ap").objectives
    assert (refusing.kind, preserving.kind) == ("idk", "answer_preservation")
    assert (preserving.beta, preserving.weight) == (0.1, 1)


def test_what_is_given_beside_a_preset_takes_its_place():
    made = Method.parse({"preset": "npo_kl", "lr": 3e-5, "objectives": ["ga"]})
    assert (made.lr, [o.kind for o in made.objectives]) == (3e-5, ["ga"])


@pytest.mark.parametrize("name", EDITING)
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
    with pytest.raises(UnknownName, match=r"no preset named 'dgs'; known: alt_po, .*Did you mean 'dsg'\?"):
        preset("dgs", "a")


def _within(row, spec):
    """Everything that the row says stands in the spec."""
    if isinstance(row, dict):
        return all(_within(value, spec[key]) for key, value in row.items())
    if isinstance(row, list):
        return len(row) == len(spec) and all(map(_within, row, spec))
    return row == spec
