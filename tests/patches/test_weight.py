"""Weight patches on live models: what the formula says, exactly reversible, merged, saved and baked."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import D_MODEL, VOCAB, make_bridge, make_hf, make_hooked, make_sae, make_tokenizer, n_hooks, words

from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import InvalidConfig, NonFinite, PatchMismatch, UnknownName
from concept_unlearn.lm import LM
from concept_unlearn.patches import FeaturePatch, Stack, WeightPatch, load_patch, merge
from concept_unlearn.weights import Dense, LowRank, Sparse

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(lm, seed=0, scale=0.2):
    """Every parameter changed, biases and norms too."""
    return WeightPatch(
        {n: Dense(scale * draw(*p.shape, seed=seed + i)) for i, (n, p) in enumerate(lm.model.named_parameters())}
    )


def mixed():
    mask = draw(D_MODEL, 32, seed=5) > 1
    return WeightPatch(
        {
            "model.embed_tokens.weight": Dense(draw(VOCAB, D_MODEL)).to(torch.bfloat16),
            UP: LowRank(draw(32, 2), draw(2, D_MODEL, seed=1)),
            DOWN: Sparse(draw(int(mask.sum())), mask),
        }
    )


def state(lm):
    return {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in lm.model.named_parameters()}


def assert_same(lm, before):
    for name, parameter in lm.model.named_parameters():
        pointer, value, grad = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, grad), name
        assert torch.equal(parameter, value), name


@pytest.fixture
def patched(lm):
    return mixed()


def test_on_any_model_it_changes_the_logits_and_leaves_every_bit_as_it_was(any_lm, ids):
    patch, before, base = everywhere(any_lm), state(any_lm), any_lm.logits(ids)
    hooks = n_hooks(any_lm.model)
    with patch.on(any_lm):
        assert not torch.allclose(any_lm.logits(ids), base)
        for name, parameter in any_lm.model.named_parameters():
            assert torch.equal(parameter, before[name][1] + patch.deltas[name].change)
    assert_same(any_lm, before)
    assert torch.equal(any_lm.logits(ids), base)
    assert n_hooks(any_lm.model) == hooks


def test_on_any_architecture_the_patch_between_two_checkpoints_gives_the_second(any_hf, ids):
    after = copy.deepcopy(any_hf.model)
    with torch.no_grad():
        for i, parameter in enumerate(after.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=i))
    patch = WeightPatch.between(dict(any_hf.model.named_parameters()), dict(after.named_parameters()))
    with patch.on(any_hf):
        torch.testing.assert_close(any_hf.logits(ids), after(ids).logits, rtol=1e-4, atol=1e-5)


def test_at_strength_zero_nothing_at_all_happens(lm, ids):
    before = state(lm)
    with WeightPatch({"no.such": Dense(torch.ones(1))}, strength=0).on(lm) as switch:
        assert switch.enabled
        assert_same(lm, before)


def test_the_change_is_linear_in_strength(lm, patched):
    before = state(lm)
    for strength in (0.25, 1.0, 3.0):
        with patched.at(strength).on(lm):
            for name, delta in patched.deltas.items():
                found = lm.model.get_parameter(name) - before[name][1]
                torch.testing.assert_close(found, strength * delta.dense(), rtol=1e-4, atol=1e-5)


def test_entries_that_are_not_changed_keep_their_bits_inside(lm, patched):
    mask = patched.deltas[DOWN].mask
    before = state(lm)
    with patched.on(lm):
        assert torch.equal(lm.model.get_parameter(DOWN)[~mask], before[DOWN][1][~mask])
        untouched = [n for n in before if n not in patched.deltas]
        assert all(lm.model.get_parameter(n).data_ptr() == before[n][0] for n in untouched)


def test_an_exception_inside_restores(lm, patched):
    before = state(lm)
    with pytest.raises(ZeroDivisionError), patched.on(lm), mixed().at(0.5).on(lm):
        raise ZeroDivisionError
    assert_same(lm, before)


def test_an_error_while_it_is_put_on_restores(lm, patched, monkeypatch):
    before = state(lm)
    monkeypatch.setattr(Sparse, "dense", lambda self: torch.zeros(3))
    with pytest.raises(RuntimeError), patched.on(lm):
        pass
    assert_same(lm, before)


def test_training_inside_the_block_leaves_the_model_alone(lm, patched):
    before = state(lm)
    with patched.on(lm) as switch:
        with torch.no_grad():
            for name in patched.deltas:
                lm.model.get_parameter(name).zero_()
        switch.enabled = False
        assert_same(lm, before)
    assert_same(lm, before)


def test_a_patch_on_top_of_another_adds_to_what_it_finds(lm, patched):
    first, second = patched, WeightPatch({UP: Dense(draw(32, D_MODEL, seed=9))})
    before = state(lm)
    with first.on(lm):
        under = lm.model.get_parameter(UP).detach().clone()
        with second.on(lm):
            assert torch.equal(lm.model.get_parameter(UP), under + second.deltas[UP].change)
        assert torch.equal(lm.model.get_parameter(UP), under)
    assert_same(lm, before)


def test_the_switch_puts_the_own_weights_back_and_the_changed_ones_again(lm, ids, patched):
    before, base = state(lm), lm.logits(ids)
    with patched.on(lm) as switch:
        on = lm.logits(ids)
        switch.enabled = False
        assert_same(lm, before)
        assert torch.equal(lm.logits(ids), base)
        switch.enabled = True
        assert torch.equal(lm.logits(ids), on)
        switch.enabled = False
    assert_same(lm, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["inner-last", "inner-first"])
def test_switches_of_patches_on_one_parameter_are_independent(lm, order):
    """Whatever is switched when, the weight is its own plus the changes that are on."""
    patches = [WeightPatch({UP: Dense(draw(32, D_MODEL, seed=i))}) for i in (1, 2)]
    before = state(lm)
    with patches[0].on(lm) as first, patches[1].on(lm) as second:
        switches = (first, second)
        for i in (*order, *order, order[0]):
            switches[i].enabled = not switches[i].enabled
            want = before[UP][1]
            for patch, switch in zip(patches, switches, strict=True):
                want = want + patch.deltas[UP].change if switch.enabled else want
            assert torch.equal(lm.model.get_parameter(UP), want)
    assert_same(lm, before)


def test_leaving_the_upper_patch_keeps_the_lower_one_switched_off(lm, patched):
    before = state(lm)
    with patched.on(lm) as lower:
        with mixed().on(lm):
            lower.enabled = False
        assert_same(lm, before)
        lower.enabled = True
        assert not torch.equal(lm.model.get_parameter(UP), before[UP][1])
    lower.enabled = True
    assert_same(lm, before)


def test_patches_may_be_taken_off_in_any_order(lm, patched):
    before = state(lm)
    lower, upper = patched.on(lm), WeightPatch({UP: Dense(draw(32, D_MODEL, seed=9))})
    lower.__enter__()
    with upper.on(lm):
        lower.__exit__(None, None, None)
        assert torch.equal(lm.model.get_parameter(UP), before[UP][1] + upper.deltas[UP].change)
    assert_same(lm, before)


def test_a_stack_with_an_activation_patch_does_both_and_has_one_switch(lm, ids, patched):
    feature = FeaturePatch(dictionary=make_sae("jumprelu"), features=[1, 3, 5], edit=DenseClamp(to=-4.0))
    base, other = lm.logits(ids), WeightPatch({UP: Dense(draw(32, D_MODEL, seed=9))})
    with patched.on(lm), other.on(lm), feature.on(lm):
        want = lm.logits(ids)
    with Stack((patched, other, feature)).on(lm) as switch:
        assert torch.equal(lm.logits(ids), want)
        switch.enabled = False
        assert torch.equal(lm.logits(ids), base)
        switch.enabled = True
        assert torch.equal(lm.logits(ids), want)
    assert torch.equal(lm.logits(ids), base)
    assert n_hooks(lm.model) == 0


def test_a_tied_embedding_is_one_parameter_changed_once(ids):
    lm = LM(make_hf("gpt2"), make_tokenizer())
    change = draw(VOCAB, D_MODEL)
    before = lm.model.lm_head.weight.detach().clone()
    found = []
    for name in ("transformer.wte.weight", "lm_head.weight"):
        with WeightPatch({name: Dense(change)}).on(lm):
            assert lm.model.lm_head.weight is lm.model.transformer.wte.weight
            assert torch.equal(lm.model.lm_head.weight, before + change)
            found.append(lm.logits(ids))
    assert torch.equal(*found)
    both = WeightPatch(dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), Dense(change)))
    with pytest.raises(InvalidConfig, match=r"wte\.weight and lm_head\.weight are one tied parameter"), both.on(lm):
        pass
    after = copy.deepcopy(lm.model)
    with torch.no_grad():
        after.lm_head.weight.add_(change)
    states = [dict(model.named_parameters(remove_duplicate=False)) for model in (lm.model, after)]
    assert list(WeightPatch.between(*states).deltas) == ["transformer.wte.weight"]


def test_it_generates_the_same_with_and_without_a_cache_in_any_batch(lm, patched):
    base = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    with patched.on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
        assert together == lm.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False)
        assert together == [lm.generate(p, max_new_tokens=6, chat=False)[0] for p in PROMPTS]
    assert together != base


def test_a_model_in_bfloat16_stays_in_bfloat16(ids, patched):
    lm = LM(make_hf().to(torch.bfloat16), make_tokenizer())
    want = (lm.model.get_parameter(UP).float() + patched.deltas[UP].dense()).bfloat16()
    with patched.on(lm):
        assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
        assert torch.equal(lm.model.get_parameter(UP), want)
        lm.logits(ids)


def test_inference_mode_around_it_does_no_harm(lm, ids, patched):
    before = state(lm)
    with torch.inference_mode(), patched.on(lm):
        lm.logits(ids)
    assert_same(lm, before)
    lm.logits(ids).sum().backward()


def test_compiled_code_follows_the_switch(lm, ids, patched, fresh_compiler):
    compiled = LM(torch.compile(lm.model, backend="eager"), make_tokenizer())
    with torch.no_grad(), patched.on(lm):
        want = lm.logits(ids)
    with torch.no_grad():
        base = compiled.logits(ids)
        with patched.on(compiled) as switch:
            assert torch.equal(compiled.logits(ids), want)
            switch.enabled = False
            assert torch.equal(compiled.logits(ids), base)


def test_the_fingerprint_is_that_of_the_model_without_the_patch(patched):
    lm, fresh = LM(make_hf()), LM(make_hf())
    with patched.on(lm):
        inside = lm.fingerprint
    assert inside == fresh.fingerprint


def test_a_patch_of_a_hugging_face_model_works_on_a_bridge_of_it(lm, ids, tmp_path, patched):
    bridge = LM(make_bridge(tmp_path / "bridge"))
    folder = patched.save(tmp_path / "patch", lm)
    with patched.on(lm):
        want = lm.logits(ids)
    with load_patch(folder, bridge).on(bridge):
        torch.testing.assert_close(bridge.logits(ids), want, rtol=1e-4, atol=1e-4)


def test_another_base_is_refused(lm, tmp_path, patched):
    folder = patched.save(tmp_path / "patch", lm)
    with pytest.raises(PatchMismatch, match="made on tiny-llama"):
        load_patch(folder, LM(make_hf(seed=1), make_tokenizer()))


def test_stored_in_bfloat16_it_takes_half_the_room_and_does_almost_the_same(lm, ids):
    patch = everywhere(lm)
    half = patch.to(torch.bfloat16)
    assert half.n_bytes * 2 == patch.n_bytes
    assert half.n_parameters == patch.n_parameters == sum(p.numel() for p in lm.model.parameters())
    before = state(lm)
    with half.on(lm):
        for name, delta in patch.deltas.items():
            found = lm.model.get_parameter(name) - before[name][1]
            torch.testing.assert_close(found, delta.dense(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("deltas", "error", "said"),
    [
        ({"model.layers.1.mlp.up.weight": Dense(torch.ones(1))}, PatchMismatch, f"no parameter .*it has {UP}"),
        ({UP: Dense(torch.ones(D_MODEL, 32))}, PatchMismatch, r"shape \(32, 16\), the change of it \(16, 32\)"),
        ({UP: LowRank(torch.ones(D_MODEL, 2), torch.ones(2, 32))}, PatchMismatch, r"the change of it \(16, 32\)"),
    ],
    ids=["name", "shape", "transposed"],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(lm, deltas, error, said):
    before = state(lm)
    good = {DOWN: Dense(torch.ones(D_MODEL, 32))}
    with pytest.raises(error, match=said), WeightPatch(good | deltas).on(lm):
        pass
    assert_same(lm, before)


@pytest.mark.parametrize(("held", "said"), [("int8", r"quantised to torch\.int8"), ("meta", "offloaded")])
def test_weights_that_are_not_there_are_refused(lm, held, said):
    weight = torch.empty(32, D_MODEL, **({"dtype": torch.int8} if held == "int8" else {"device": "meta"}))
    lm.model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InvalidConfig, match=said), WeightPatch({UP: Dense(torch.ones(32, D_MODEL))}).on(lm):
        pass


def test_between_leaves_out_what_is_equal_and_refuses_what_is_not_comparable():
    before = {"a": torch.ones(2), "b": torch.ones(3), "steps": torch.tensor([3])}
    after = before | {"b": torch.tensor([1.0, 2.0, 3.0])}
    patch = WeightPatch.between(before, after, dtype=torch.bfloat16)
    assert list(patch.deltas) == ["b"]
    assert patch.deltas["b"].change.tolist() == [0, 1, 2]
    assert patch.deltas["b"].change.dtype == torch.bfloat16
    assert WeightPatch.between(before, before).deltas == {}
    refused = {
        "others are in only one": {"a": torch.ones(2), "b": torch.ones(3)},
        r"shape \(2,\) before and \(4,\) after": before | {"a": torch.ones(4)},
        "only floats can change": before | {"steps": torch.tensor([4])},
    }
    for said, other in refused.items():
        with pytest.raises((PatchMismatch, InvalidConfig), match=said):
            WeightPatch.between(before, other)
    with pytest.raises(NonFinite, match="the change of a is NaN"):
        WeightPatch.between(before, before | {"a": torch.tensor([1.0, float("nan")])})


def test_what_is_no_change_or_no_strength_is_refused():
    with pytest.raises(InvalidConfig, match="a change is Dense, LowRank or Sparse"):
        WeightPatch({UP: torch.ones(2)})
    with pytest.raises(InvalidConfig, match="strength is 0"):
        WeightPatch({}, strength=-1)


def test_a_merge_of_one_patch_is_that_patch(patched):
    weak = patched.at(0.5)
    for how, settings in {"sum": {}, "mean": {}, "ties": {}, "task_arithmetic": {"weights": [1.0]}}.items():
        assert merge([weak], how, **settings) is weak
    assert merge([weak], "ties", density=0.0).deltas == {}
    doubled = merge([weak], "task_arithmetic", weights=(2.0,))
    torch.testing.assert_close(doubled.deltas[UP].dense(), patched.deltas[UP].dense())


def test_low_rank_changes_merge_as_products_at_their_strengths():
    made = [WeightPatch({UP: LowRank(draw(32, 1, seed=i), draw(1, D_MODEL, seed=i + 5))}) for i in (1, 2)]
    first, second = (p.deltas[UP].dense() for p in made)
    found = merge([made[0], made[1].at(0.5)], "mean").deltas[UP].dense()
    torch.testing.assert_close(found, (first + 0.5 * second) / 2)
    assert torch.linalg.matrix_rank(found) == 2


def test_a_merge_by_sum_does_what_the_stack_does(lm, ids):
    patches = (mixed(), WeightPatch({UP: Dense(draw(32, D_MODEL, seed=9))}, strength=0.5))
    with Stack(patches).on(lm):
        want = lm.logits(ids)
    with merge(patches, "sum").on(lm):
        torch.testing.assert_close(lm.logits(ids), want, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_one_patch_leaves_alone_counts_as_unchanged():
    a, b = WeightPatch({"a": Dense(torch.ones(2))}), WeightPatch({"b": Dense(torch.ones(2))})
    assert merge([a, b], "mean").deltas["a"].change.tolist() == [0.5, 0.5]
    assert merge([a, b], "ties").deltas["a"].change.tolist() == [1, 1]


def test_patches_that_cannot_be_merged_are_refused(lm, patched):
    other = LM(make_hf(seed=1), make_tokenizer(), name="other")
    refused = [
        (([patched.met(lm), patched.met(other)],), {}, PatchMismatch, "different models.*other"),
        (([patched, patched], "tise"), {}, UnknownName, "Did you mean 'ties'"),
        (([patched, patched], "mean"), {"density": 0.5}, InvalidConfig, "density= with ties"),
        (([patched, patched], "ties"), {"weights": [1, 1]}, InvalidConfig, "weights= goes with task_arithmetic"),
        (([patched, patched], "task_arithmetic"), {}, InvalidConfig, "one weight an input: 2; given: 0"),
        (([patched, Stack(())],), {}, InvalidConfig, "given: Stack"),
        (([],), {}, InvalidConfig, "nothing to merge"),
    ]
    for arguments, settings, error, said in refused:
        with pytest.raises(error, match=said):
            merge(*arguments, **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_baked_model_is_the_patched_one_and_the_live_one_stays(tmp_path, ids, kind, dtype):
    make_hf(kind).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lm = LM.load(str(tmp_path / "base"), dtype=str(dtype).removeprefix("torch."), device="cpu")
    patch, before, config = everywhere(lm), state(lm), copy.deepcopy(vars(lm.model.config))
    folder = patch.bake(lm, tmp_path / "out" / "baked")
    assert_same(lm, before)
    assert vars(lm.model.config) == config
    with patch.on(lm):
        want = lm.logits(ids)
    again = LM.load(str(folder), dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert torch.equal(again.logits(ids), want)
    assert {p.dtype for p in again.model.parameters()} == {dtype}
    assert again.encode(PROMPTS[0], chat=False) == lm.encode(PROMPTS[0], chat=False)
    assert [p.suffix for p in folder.iterdir() if "model" in p.name] == [".safetensors"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_bake_leaves_nothing_behind(lm, tmp_path, patched, monkeypatch):
    before = state(lm)

    def full(folder, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        patched.bake(lm, tmp_path / "baked")
    assert not list(tmp_path.iterdir())
    assert_same(lm, before)


def test_a_model_that_came_from_gguf_can_be_baked(lm, tmp_path, patched):
    from types import SimpleNamespace

    from transformers import GgufConfig

    config = GgufConfig(dequantize=True)
    quantizer = SimpleNamespace(quantization_config=config, is_serializable=lambda: False)
    lm.model.hf_quantizer, lm.model.config.quantization_config = quantizer, config
    patched.bake(lm, tmp_path / "baked")
    assert (lm.model.hf_quantizer, lm.model.config.quantization_config) == (quantizer, config)
    assert "quantization_config" not in (tmp_path / "baked" / "config.json").read_text()


def test_baking_never_overwrites_and_says_what_it_cannot_do(lm, tmp_path, patched):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for taken in ("full", "full/notes.txt"):
        with pytest.raises(InvalidConfig, match="is there already"):
            patched.bake(lm, tmp_path / taken)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (patched.bake(lm, tmp_path / "empty") / "config.json").is_file()
    with pytest.raises(InvalidConfig, match="no longer a Hugging Face checkpoint"):
        WeightPatch({}).bake(LM(make_hooked(tmp_path / "tl")), tmp_path / "new")
