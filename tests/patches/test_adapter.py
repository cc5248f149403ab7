"""Adapters on live models: exactly what they add, exactly reversible, however the model is run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import D_MODEL, make_hf, make_tokenizer, n_hooks
from patches.adapters import PROMPTS, SENSOR, SITES, logits, make

from concept_unlearn.data.encode import pad
from concept_unlearn.errors import InvalidConfig, PatchMismatch
from concept_unlearn.gates import ProbeGate, SequenceGate, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.forward import forward
from concept_unlearn.patches import AdapterPatch, Stack, load_patch
from concept_unlearn.patches.fusion import with_grams

GATES = {
    "always": {},
    "sequence": {"gate": SequenceGate(above=0.5), "sensor": SENSOR},
    "streaming": {"gate": StreamingGate(above=0.9, drift=0.5), "sensor": SENSOR},
    "probe": {"gate": ProbeGate(above=0.0), "sensor": SENSOR},
}


def seen(lm, ids, site, patch=None):
    """The activation at a site, before an edit of it where there is one."""
    with torch.no_grad(), lm.read(site) as found:
        logits(lm, ids, patch)
    return found[site]


@pytest.mark.parametrize("kind", ["bottleneck", "linear"])
class TestFormula:
    def test_what_is_added_is_the_adapter_of_what_is_there(self, lm, ids, kind):
        patch = make(kind, sites=SITES[:1])
        h = seen(lm, ids, SITES[0])
        with torch.no_grad(), patch.on(lm), lm.read(SITES[0]) as after:
            lm.logits(ids)
        t = patch.adapters[SITES[0]].tensors()
        if kind == "bottleneck":
            inner = torch.nn.functional.gelu(h @ t["down.weight"].T + t["down.bias"])
            change = inner @ t["up.weight"].T + t["up.bias"]
        else:
            change = h @ t["map.weight"].T + t["map.bias"]
        torch.testing.assert_close(after[SITES[0]], h + change)

    def test_without_a_last_map_it_is_the_identity_for_any_input(self, lm, ids, kind):
        patch = make(kind)
        for adapter in patch.adapters.values():
            for t in adapter.maps[adapter.names[-1]]:
                t.zero_()
        assert torch.equal(logits(lm, ids, patch), logits(lm, ids))

    @pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
    def test_strength_is_exact_at_its_ends_and_linear_between(self, lm, ids, kind, strength):
        patch, site = make(kind, sites=SITES[:1]), SITES[0]
        with torch.no_grad(), patch.at(strength).on(lm), lm.read(site) as found:
            lm.logits(ids)
        with torch.no_grad(), patch.on(lm), lm.read(site) as whole:
            lm.logits(ids)
        h = seen(lm, ids, site)
        if strength in (0, 1):
            assert torch.equal(found[site], whole[site] if strength else h)
        torch.testing.assert_close(found[site], h + strength * (whole[site] - h))

    def test_a_loaded_patch_does_the_same_to_the_last_bit(self, lm, ids, tmp_path, kind):
        patch = with_grams(make(kind, strength=0.5), lm, [[7, 8, 9], [10, 11]])
        patch = replace(patch, gate=ProbeGate(above=-100.0), sensor=SENSOR).met(lm, PROMPTS)
        again = load_patch(patch.save(tmp_path / "patch"), lm)
        assert isinstance(again, AdapterPatch)
        assert again.spec() == patch.spec()
        assert again.digest == patch.digest
        assert torch.equal(logits(lm, ids, again), logits(lm, ids, patch))
        assert not torch.equal(logits(lm, ids, again), logits(lm, ids))


@pytest.mark.parametrize("gate", GATES)
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, gate):
    """Cached = uncached = batched = padded = one by one."""
    patch = make(**GATES[gate])
    base = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    with patch.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)
        assert together == [lm.generate(p, max_new_tokens=6, chat=False)[0] for p in PROMPTS]
    changed = [a != b for a, b in zip(together, base, strict=True)]
    assert any(changed)
    assert all(changed) == (gate == "always")
    assert lm.generate(PROMPTS, max_new_tokens=6, chat=False) == base


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", ["always", "probe"])
def test_padding_on_either_side_changes_nothing(lm, side, gate):
    patch = make(**GATES[gate])
    rows = [lm.encode(p, chat=False) for p in PROMPTS]
    ids, mask = pad(rows, side=side)
    with torch.no_grad(), patch.on(lm):
        together = forward(lm.model, ids, mask).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(together[i][mask[i]], lm.logits(torch.tensor([row]))[0], rtol=1e-4, atol=1e-4)


def test_bos_and_padding_are_never_touched(lm):
    ids, mask = torch.tensor([[0, 7, 8, 0]]), torch.tensor([[True, True, True, False]])
    with torch.no_grad(), lm.read(SITES[0]) as plain:
        forward(lm.model, ids, mask)
    with torch.no_grad(), make(sites=SITES[:1]).on(lm), lm.read(SITES[0]) as edited:
        forward(lm.model, ids, mask)
    same = (plain[SITES[0]] == edited[SITES[0]]).all(-1)[0]
    assert same.tolist() == [True, False, False, True]


def test_every_library_of_models_may_be_edited(any_lm, ids):
    plain = logits(any_lm, ids)
    assert not torch.allclose(logits(any_lm, ids, make()), plain, atol=1e-2)
    assert torch.equal(logits(any_lm, ids), plain)


def test_every_kind_of_model_may_be_edited(any_hf, ids):
    plain = logits(any_hf, ids)
    assert not torch.allclose(logits(any_hf, ids, make()), plain, atol=1e-2)
    assert torch.equal(logits(any_hf, ids), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_edited_in_the_adapters_own(ids, dtype):
    lm, patch = LM(make_hf().to(dtype), make_tokenizer()), make(sites=SITES[:1])
    h = seen(lm, ids, SITES[0])
    with torch.no_grad(), patch.on(lm), lm.read(SITES[0]) as after:
        lm.logits(ids)
    change = patch.adapters[SITES[0]](h.float())
    wide = h if dtype == torch.float64 else h.float()
    assert torch.equal(after[SITES[0]], (wide + change).to(dtype))


def test_gradients_pass_and_reach_no_parameter_of_the_model_that_wants_none(lm, ids):
    lm.model.requires_grad_(False)
    patch = make()
    leaves = [t.requires_grad_() for a in patch.adapters.values() for t in a.tensors().values()]
    with patch.on(lm):
        lm.logits(ids).square().mean().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves)
    assert all(p.grad is None for p in lm.model.parameters())


def test_off_opens_no_hook_and_the_switch_turns_it_off_and_on(lm, ids):
    before = [p.clone() for p in lm.model.parameters()]
    plain, edited = logits(lm, ids), logits(lm, ids, make())
    with make(strength=0.0).on(lm):
        assert n_hooks(lm.model) == 0
    with torch.no_grad(), make().on(lm) as switch:
        switch.enabled = False
        assert torch.equal(lm.logits(ids), plain)
        switch.enabled = True
        assert torch.equal(lm.logits(ids), edited)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


def test_nothing_is_left_after_an_error(lm, ids):
    plain = logits(lm, ids)
    with pytest.raises(KeyboardInterrupt), make().on(lm):
        raise KeyboardInterrupt
    assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm, ids), plain)


def test_patches_nest_last_in_first_out_and_stack_alike(lm, ids):
    one, two = make(seed=1), make("linear", seed=5)
    alone = logits(lm, ids, one)
    with torch.no_grad(), one.on(lm):
        with two.on(lm):
            nested = lm.logits(ids)
        assert torch.equal(lm.logits(ids), alone)
    assert torch.equal(nested, logits(lm, ids, Stack((one, two))))
    assert not torch.allclose(nested, logits(lm, ids, Stack((two, one))))


def test_another_base_is_refused(lm, tmp_path):
    folder = make().save(tmp_path / "patch", lm)
    with pytest.raises(PatchMismatch, match="made on tiny-llama"):
        load_patch(folder, LM(make_hf(seed=1), make_tokenizer(), name="other"))


def test_without_its_gram_matrices_it_does_the_same_and_is_smaller(lm, ids):
    patch = with_grams(make(), lm, [[7, 8, 9]])
    bare = patch.without_grams()
    assert torch.equal(logits(lm, ids, bare), logits(lm, ids, patch))
    assert bare.n_bytes < patch.n_bytes
    assert not any("gram" in name for name in bare.tensors())
    assert bare.n_parameters == patch.n_parameters == 2 * (3 * (2 * D_MODEL + 1) + D_MODEL)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sites": ()}, "needs an adapter"),
        ({"gate": TokenGate()}, "a token gate counts features, and an adapter has none"),
        ({"gate": ProbeGate(above=0.0)}, "give a gate for whole sequences, and a sensor="),
        ({"gate": TokenGate(), "sensor": SENSOR}, "a token gate"),
        ({"strength": -1.0}, "strength"),
        ({"gate": ProbeGate(above=0.0), "sensor": replace(SENSOR, site=Site("resid_post", 0))}, "after the edit"),
        ({"grams": {SITES[0]: {"down": torch.eye(17)}}}, "of every map of every adapter"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_it_says_what_does_not_fit(settings, says):
    with pytest.raises(InvalidConfig, match=says):
        make(**settings)


def test_an_adapter_of_another_width_is_named(lm, ids):
    with pytest.raises(PatchMismatch, match=r"blocks\.0\.hook_mlp_out is 24 wide, and the model is 16"):
        logits(lm, ids, make(d=24))
