"""Guards of the prompt: flagged prompts are edited where it is said, others not by a bit, however the model is run."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, n_hooks, words

from concept_unlearn.data.encode import pad
from concept_unlearn.dictionaries import direction
from concept_unlearn.edits import Shift
from concept_unlearn.errors import DictionaryMismatch, InvalidConfig, PatchMismatch, PatchNotReached
from concept_unlearn.gates import Always, ProbeGate, SequenceGate, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.lm.forward import forward
from concept_unlearn.patches import FeaturePatch, PromptPatch, Stack, load_patch
from concept_unlearn.patches.prompt_edits import Corruption, Vectors

SITE = Site("resid_pre", 0)
PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40, 41, 42), words(13)]


def vectors(k=2, seed=0):
    return torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(seed))


EDITS = {
    "first": Vectors(vectors()),
    "all": Vectors(vectors(1), "all"),
    "noise": Corruption(sigma=1.0),
    "some": Corruption(sigma=1.0, n=5, seed=3),
    "picked": Corruption(sigma=1.0, above=0.5),
    "zero": Corruption(how="zero"),
    "flip": Corruption(how="flip", n=7),
}
any_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
either_kind = pytest.mark.parametrize("edit", [EDITS["first"], EDITS["picked"]], ids=lambda e: e.kind)


def sensor(site=SITE):
    read = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    return direction(site, read, read, normalisation="constant_norm_rescale")


def encoded(lm, prompts=PROMPTS):
    return [lm.encode(p, chat=False) for p in prompts]


def guard(lm, edit, gate=None):
    """A probe gate that flags some prompts of these and not others."""
    if gate is None:
        scores = []
        for ids in encoded(lm):
            x = lm.activations(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), SITE)[SITE]
            scores.append(float(sensor().encode(x).acts.mean()))
        gate = ProbeGate(above=sum(sorted(scores)[1:3]) / 2, pool="mean")
    return PromptPatch(edit=edit, gate=gate, sensor=None if isinstance(gate, Always) else sensor())


def embeddings(lm, patch, ids, mask=None):
    """What the blocks read."""
    with torch.no_grad(), patch.on(lm), lm.read(SITE) as seen:
        lm.logits(ids, mask)
    return seen[SITE]


@any_edit
def test_a_prompt_that_is_not_flagged_is_bit_identical_and_a_flagged_one_is_not(lm, edit):
    patch = guard(lm, edit)
    flags = patch.flagged(lm, encoded(lm)).tolist()
    assert set(flags) == {True, False}
    for ids, flag in zip(encoded(lm), flags, strict=True):
        row = torch.tensor([ids])
        base = lm.logits(row)
        with patch.on(lm):
            assert torch.equal(lm.logits(row), base) != flag


@any_edit
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, edit):
    """Cached = uncached = batched with others = padded = one by one, one-token prompts and beams among them."""
    patch = guard(lm, edit)
    with patch.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
        assert together == [lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]
        assert together[::-1] == lm.generate(PROMPTS[::-1], max_new_tokens=8, chat=False, batch_size=2)
        ids = torch.tensor([lm.encode(p, chat=False)[:3] for p in (PROMPTS[0], PROMPTS[2], PROMPTS[3])])
        beam = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, "do_sample": False, "num_beams": 3}
        assert torch.equal(
            lm.model.generate(ids, use_cache=True, **beam), lm.model.generate(ids, use_cache=False, **beam)
        )


@any_edit
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_company_change_nothing(lm, edit, side):
    patch, rows = guard(lm, edit), encoded(lm)
    ids, mask = pad(rows, side=side)
    with torch.no_grad(), patch.on(lm):
        together = forward(lm.model, ids, mask).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(together[i][mask[i]], lm.logits(torch.tensor([row]))[0], rtol=1e-4, atol=1e-4)


@either_kind
def test_it_works_in_every_library(any_lm, edit):
    patch = guard(any_lm, edit)
    base = any_lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    with patch.on(any_lm):
        found = any_lm.generate(PROMPTS, max_new_tokens=6, chat=False)
        assert found == any_lm.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)
    row = torch.tensor([encoded(any_lm)[patch.flagged(any_lm, encoded(any_lm)).tolist().index(True)]])
    logits = any_lm.logits(row)
    with patch.on(any_lm):
        assert not torch.allclose(any_lm.logits(row), logits)
    assert any_lm.generate(PROMPTS, max_new_tokens=6, chat=False) == base


@either_kind
def test_it_works_in_every_architecture(any_hf, edit):
    patch = guard(any_hf, edit)
    with patch.on(any_hf):
        found = any_hf.generate(PROMPTS, max_new_tokens=6, chat=False)
        assert found == any_hf.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)


def test_the_same_prompt_gets_the_same_noise_and_another_prompt_another(lm):
    patch = PromptPatch(edit=Corruption())
    rows = [[0, 7, 8, 9, 10], [7, 8, 9, 10], [7, 8, 9, 11], [8, 8, 9, 10]]
    noise = []
    for side in ("left", "right"):
        ids, mask = pad(rows, side=side)
        with torch.no_grad():
            base = lm.activations(ids, mask, SITE)[SITE]
        change = embeddings(lm, patch, ids, mask) - base
        noise.append([change[i][mask[i]] for i in range(len(rows))])
    for left, right in zip(*noise, strict=True):
        assert torch.equal(left, right)
    plain, other_end, other_start = noise[0][1:]
    assert (noise[0][0][0] == 0).all()  # BOS
    assert torch.equal(plain[:3], other_end[:3])  # noise of a token depends on nothing after it
    assert not torch.isclose(plain[1], other_start[1]).any()


def test_a_prompt_that_comes_in_pieces_is_edited_as_in_one(lm):
    row = torch.tensor([[7, 8, 9, 10, 11, 12]])
    for edit in (EDITS["all"], Vectors(vectors(4)), Corruption(above=-1e9)):
        patch = PromptPatch(edit=edit, sensor=sensor())
        with torch.no_grad(), patch.on(lm):
            whole = lm.logits(row)
            first = lm.model(row[:, :2], use_cache=True)
            rest = lm.model(row[:, 2:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_noise_is_standard_normal_uncorrelated_and_follows_its_seed():
    from concept_unlearn.patches.noise import gaussian

    keys = torch.arange(2000)
    x = gaussian(keys, 64, seed=0)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x.abs() < 1).float().mean()) - 0.6827) < 0.005
    assert float(x.double().T.corrcoef().fill_diagonal_(0).abs().max()) < 0.12
    assert float(torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1].abs()) < 0.01
    assert torch.equal(x[7:9, :5], gaussian(keys[7:9], 64, seed=0)[:, :5])
    assert not torch.isclose(x, gaussian(keys, 64, seed=1)).all(1).any()


def test_vectors_are_added_to_the_first_tokens_of_the_text(lm):
    ids, mask = pad([[0, 7, 8, 9], [10]], side="left")
    x = lm.activations(ids, mask, SITE)[SITE]
    found = embeddings(lm, PromptPatch(edit=Vectors(vectors())), ids, mask) - x
    want = torch.zeros_like(x)
    want[0, 1], want[0, 2], want[1, 3] = vectors()[0], vectors()[1], vectors()[0]
    torch.testing.assert_close(found, want)
    found = embeddings(lm, PromptPatch(edit=Vectors(vectors(1), "all")), ids, mask) - x
    torch.testing.assert_close(found, (mask & (ids != 0))[..., None] * vectors(1)[0])


def test_what_every_chat_begins_with_is_left_alone(lm):
    """w4 opens every chat of this tokenizer."""
    ids = torch.tensor([lm.encode(words(7, 8), chat=True)])
    assert ids.tolist() == [[4, 7, 8, 5, 6]]
    x = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), SITE)[SITE]
    changed = (embeddings(lm, PromptPatch(edit=Vectors(vectors(1))), ids) != x).any(-1)
    assert changed.tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize(
    ("edit", "row", "want"),
    [
        (Corruption(), [7, 8, 9], [1, 1, 0]),
        (Corruption(), [7], [1]),
        (Corruption(above=1e9), [7, 8, 9], [1, 1, 0]),
        (Corruption(above=-1e9), [7, 8, 9], [1, 1, 1]),
        (Corruption(above=0.0), [0, 7], [0, 1]),
    ],
)
def test_tokens_that_are_flagged_are_corrupted_or_else_all_but_the_last(lm, edit, row, want):
    ids = torch.tensor([row])
    x = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), SITE)[SITE]
    changed = (embeddings(lm, PromptPatch(edit=edit, sensor=sensor()), ids) != x).any(-1)
    assert changed[0].long().tolist() == want


def test_only_flagged_tokens_and_the_first_dimensions_are_touched(lm):
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    x = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), SITE)[SITE]
    score = sensor().encode(x).acts[0, :, 0]
    above = float(score.median())
    for how, want in (("zero", 0.0), ("flip", -1.0)):
        patch = PromptPatch(edit=Corruption(how=how, n=5, above=above), sensor=sensor())
        found = embeddings(lm, patch, ids)[0]
        expected = x[0].clone()
        expected[score > above, :5] *= want
        torch.testing.assert_close(found, expected)


@any_edit
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_scales_the_change_and_is_exact_at_its_ends(lm, ids, edit, strength):
    patch = PromptPatch(edit=edit, sensor=sensor())
    base, full = lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), SITE)[SITE], embeddings(lm, patch, ids)
    found = embeddings(lm, patch.at(strength), ids)
    if strength in (0.0, 1.0):
        assert torch.equal(found, full if strength else base)
    torch.testing.assert_close(found, base + strength * (full - base), rtol=1e-5, atol=1e-5)
    with patch.at(0.0).on(lm):
        assert n_hooks(lm.model) == 0


def test_the_models_own_words_are_never_edited(lm):
    seen = []
    patch = PromptPatch(edit=Vectors(vectors(1), "all"))
    base = lm.model.model.embed_tokens.weight
    with patch.on(lm), lm.read(SITE) as read:
        handle = lm.model.register_forward_hook(lambda *_: seen.append(read[SITE]))
        out = lm.model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        handle.remove()
    assert [x.shape[1] for x in seen] == [2, 1, 1, 1]
    assert not torch.allclose(seen[0][0], base[[7, 8]])
    for x, token in zip(seen[1:], out[0, 2:], strict=False):
        assert torch.equal(x[0, 0], base[token])


def test_an_answer_is_scored_as_it_would_be_generated(lm):
    patch, prompts = guard(lm, EDITS["noise"]), encoded(lm)
    answers = [[[7, 8, 9, 10], [20, 21]]] * len(prompts)
    with torch.no_grad(), patch.on(lm):
        for prompt, group in zip(prompts, lm.score(prompts, answers), strict=True):
            for answer, found in zip(answers[0], group, strict=True):
                stepped, cache = [], None
                for step in [prompt, *[[t] for t in answer[:-1]]]:
                    out = lm.model(torch.tensor([step]), past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    stepped.append(out.logits[0, -1].log_softmax(-1)[answer[len(stepped)]])
                torch.testing.assert_close(found.logprobs, torch.stack(stepped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "gate",
    [TokenGate(above=0.0), SequenceGate(above=0.3), StreamingGate(above=0.5), ProbeGate(above=0.0, pool="max")],
    ids=lambda g: g.kind,
)
def test_any_gate_will_do(lm, gate):
    patch = guard(lm, EDITS["all"], gate)
    with patch.on(lm):
        found = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
        assert found == lm.generate(PROMPTS, max_new_tokens=8, chat=False, use_cache=False)
        assert found == [lm.generate(p, max_new_tokens=8, chat=False)[0] for p in PROMPTS]


@any_edit
def test_it_survives_a_file_and_refuses_another_base(lm, edit, tmp_path):
    from conftest import make_hf, make_tokenizer

    patch = guard(lm, edit)
    folder = patch.save(tmp_path, lm)
    loaded = load_patch(folder, lm)
    assert loaded.digest == patch.digest
    assert (loaded.access, loaded.queries) == ("prompts", 0)
    ids, mask = pad(encoded(lm), side="left")
    assert torch.equal(embeddings(lm, loaded, ids, mask), embeddings(lm, patch, ids, mask))
    with pytest.raises(PatchMismatch):
        load_patch(folder, LM(make_hf("qwen2"), make_tokenizer()))


@any_edit
def test_nothing_is_left_behind(lm, ids, edit):
    """Parameters are untouched, hooks are gone after errors too, and patches nest."""
    before, base = checksum(lm.model), lm.logits(ids)
    patch = PromptPatch(edit=edit, sensor=sensor())
    inner = FeaturePatch(slices=(direction(Site("resid_post", 1), vectors(1)[0], vectors(1)[0]),), edit=Shift(by=1.0))
    with patch.on(lm) as switch:
        alone = lm.logits(ids)
        switch.enabled = False
        assert torch.equal(lm.logits(ids), base)
    with inner.on(lm), patch.on(lm):
        both = lm.logits(ids)
    with Stack((inner, patch)).on(lm):
        assert torch.equal(lm.logits(ids), both)
    with pytest.raises(RuntimeError), patch.on(lm), inner.on(lm):
        raise RuntimeError
    assert torch.equal(lm.logits(ids), base)
    assert not torch.equal(alone, base)
    assert not torch.equal(alone, both)
    assert (n_hooks(lm.model), checksum(lm.model)) == (0, before)


def test_gradients_reach_the_vectors_and_nothing_else(lm, ids):
    given = vectors().requires_grad_()
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    with PromptPatch(edit=Vectors(given)).on(lm):
        lm.logits(ids).square().mean().backward()
    assert given.grad.abs().min() > 0
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PromptPatch(edit=Corruption(), gate=ProbeGate(above=0.0)), "probe gate needs a sensor"),
        (lambda: PromptPatch(edit=Corruption(), sensor=sensor(Site("resid_post", 0))), "computes after the edit"),
        (lambda: PromptPatch(edit=Corruption(), strength=-1.0), "strength"),
        (lambda: Vectors(vectors(2), "all"), "one vector is added to all tokens; given: 2"),
        (lambda: Vectors(torch.zeros(3)), r"vectors are \[k, d\]"),
        (lambda: Corruption(how="shuffle"), "noise, zero or flip; given: 'shuffle'"),
        (lambda: Corruption(sigma=-1.0), "sigma is a standard deviation"),
        (lambda: Corruption(n=0), "n counts dimensions"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(make, match):
    with pytest.raises(InvalidConfig, match=match):
        make()


def test_widths_that_do_not_fit_and_prompts_without_ids_are_named(lm, ids):
    with PromptPatch(edit=Vectors(torch.zeros(1, 3))).on(lm), pytest.raises(DictionaryMismatch, match="3 dimensions"):
        lm.logits(ids)
    with PromptPatch(edit=Corruption(n=99)).on(lm), pytest.raises(InvalidConfig, match="at most 16"):
        lm.logits(ids)
    with PromptPatch(edit=Corruption()).on(lm), pytest.raises(PatchNotReached, match="came as embeddings"):
        lm.model(inputs_embeds=torch.zeros(1, 3, D_MODEL))
