"""Finetuning under a mask: what is not chosen stays bit for bit, and what is chosen is trained as ever."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hf, make_tokenizer
from workers import finetune_in, tiny_finetune, tiny_scope, together

from concept_unlearn.errors import CorruptArtifact, InvalidConfig
from concept_unlearn.lm import LM
from concept_unlearn.methods import Method, Study, finetune
from concept_unlearn.objectives import DPO, GA, IDK, NPO, RMU, RetainEmbedding, RetainKL, RetainNLL
from concept_unlearn.patches import load_patch
from concept_unlearn.training import Mask, Watch
from concept_unlearn.training.attribution import Attribution
from concept_unlearn.weights import MagnitudeWeightScore, RandomWeightScore, WagleWeightScore

HALF = Mask(ratio=0.5)


@pytest.fixture
def scope():
    return tiny_scope()


def fit(lm, scope, *, probe=None, folder=None, **settings):
    """The patch, and every step's losses."""
    seen = []
    method = tiny_finetune(**settings)
    patch = method.fit(Study(lm, scope, folder=folder), log=lambda _, values: seen.append(values), probe=probe)
    return patch, [values for values in seen if "loss" in values]


def assert_equal(a, b, *, atol=0.0):
    assert a.deltas.keys() == b.deltas.keys()
    for name in a.deltas:
        torch.testing.assert_close(a.deltas[name].dense(), b.deltas[name].dense(), rtol=0, atol=atol)


def assert_held(lm, patch, masks):
    """The patched model differs from the model where the masks are True, and almost everywhere there."""
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    moved = chosen = 0
    with patch.on(lm):
        for name, p in lm.model.named_parameters():
            assert torch.equal(p[~masks[name]], before[name][~masks[name]])
            moved += int((p != before[name])[masks[name]].sum())
            chosen += int(masks[name].sum())
    assert 0.8 * chosen < moved <= chosen


class TestWhatIsKept:
    def test_it_is_kept_bit_for_bit_through_fifty_steps_with_decay(self, lm, scope):
        method = tiny_finetune(mask=HALF, weight_decay=0.1, lr=1e-2, epochs=20)
        masks, first, moved = method.selected(lm, scope), {}, {}

        def look(step):
            for name, p in lm.model.named_parameters():
                kept = p.detach()[~masks[name]].clone()
                assert torch.equal(kept, first.setdefault(name, kept))
            moved[step] = True

        patch = method.fit(Study(lm, scope), probe=look)
        assert len(moved) > 50
        assert_held(lm, patch, masks)

    @pytest.mark.parametrize(
        "objectives",
        [(NPO(), RetainKL()), (IDK(), RetainNLL()), (DPO(), RetainNLL()), (GA(),)],
        ids=lambda objectives: objectives[0].kind,
    )
    def test_whatever_the_objective(self, lm, scope, objectives):
        method = tiny_finetune(mask=HALF, objectives=objectives)
        assert_held(lm, method(lm, scope), method.selected(lm, scope))

    def test_in_half_precision_too(self, scope):
        lm = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="half")
        method = tiny_finetune(mask=HALF, lr=1e-1)
        assert_held(lm, method(lm, scope), method.selected(lm, scope))

    def test_and_what_the_watch_found_best(self, lm, scope, tmp_path):
        method = tiny_finetune(mask=HALF, watch=Watch(keep=0.01))
        assert_held(lm, method(lm, scope, folder=tmp_path), method.selected(lm, scope))

    def test_an_objective_for_some_parameters_is_masked_within_them(self, lm, scope):
        method = tiny_finetune(objectives=(RMU(), RetainEmbedding()), mask=HALF, epochs=20, lr=1e-2)
        masks = method.selected(lm, scope)
        assert set(masks) == set(RMU().trains(lm))
        patch = method(lm, scope)
        assert patch.deltas
        assert not any((d.dense() != 0)[~masks[name]].any() for name, d in patch.deltas.items())


class TestWhatIsTrained:
    def test_a_ratio_of_one_is_the_run_without_a_mask(self, lm, scope):
        settings = {"weight_decay": 0.1}
        assert_equal(fit(lm, scope, mask=Mask(ratio=1.0), **settings)[0], fit(lm, scope, **settings)[0])

    def test_weights_that_are_trained_decay_as_adamws_do(self, lm, scope):
        """Every weight but the few smallest is trained, so nearly all is as without a mask."""
        settings = {"weight_decay": 1.0, "lr": 1e-3, "max_steps": 2}
        whole, masked, without = (
            fit(lm, scope, **{**settings, **more})[0]
            for more in ({}, {"mask": Mask(score=MagnitudeWeightScore(), ratio=0.999)}, {"weight_decay": 0.0})
        )
        assert_equal(masked, whole, atol=2.5e-3)  # two steps of Adam where a weight is held
        for name in ("lm_head.weight", "model.norm.weight"):
            off, decay = (
                (whole.deltas[name].dense() - other.deltas[name].dense()).abs().median() for other in (masked, without)
            )
            assert off < decay / 100

    def test_the_norm_that_is_clipped_is_that_of_the_gradient_that_is_applied(self, lm, scope):
        settings = {"objectives": (GA(),), "batch_size": 64, "micro_batch": 64}
        method = tiny_finetune(mask=HALF, **settings)
        masks = method.selected(lm, scope)
        batch = finetune.make_data(lm, scope, ["forget"], method)
        with finetune.train_weights(lm, None) as trainable:
            how = finetune.autocast(lm, "auto")
            g = Attribution(trainable, batch, trainable.head(), how).gradient("forget")
        norm = float(torch.cat([t[masks[name]] for name, t in g.items()]).norm())
        assert fit(lm, scope, mask=HALF, **settings)[1][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert fit(lm, scope, **settings)[1][0]["grad_norm"] > 1.01 * norm

    def test_feed_forward_only_is_a_pattern_of_parameters(self, lm, scope):
        method = Method.parse(tiny_finetune().spec() | {"parameters": ["*mlp*"]})
        assert set(method(lm, scope).deltas) == {n for n, _ in lm.model.named_parameters() if "mlp" in n}

    def test_it_forgets(self, lm, scope):
        _, losses = fit(lm, scope, mask=HALF)
        assert losses[-1]["forget_nll"] > losses[0]["forget_nll"] + 0.1


class TestThePatch:
    def test_it_holds_the_chosen_entries_and_a_bit_for_each(self, lm, scope, tmp_path):
        method = tiny_finetune(mask=Mask(score=RandomWeightScore(), ratio=0.2))
        masks, patch = method.selected(lm, scope), method(lm, scope)
        matrices = {name: d for name, d in patch.deltas.items() if d.dense().ndim > 1}
        assert {d.kind for d in matrices.values()} == {"sparse"}
        assert all(torch.equal(d.mask, masks[name]) for name, d in matrices.items())
        dense = tiny_finetune()(lm, scope)
        for name, one in (("masked", patch), ("dense", dense)):
            one.save(tmp_path / name, lm)
        room = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("masked", "dense")]
        assert room[0] < 0.6 * room[1]
        assert_equal(load_patch(tmp_path / "masked", lm), patch)

    def test_half_strength_leaves_the_kept_alone_too(self, lm, scope):
        method = tiny_finetune(mask=HALF)
        assert_held(lm, method(lm, scope).at(0.5), method.selected(lm, scope))

    def test_bfloat16_holds_the_same_mask(self, lm, scope):
        method = tiny_finetune(mask=HALF, store="bfloat16")
        assert_held(lm, method(lm, scope), method.selected(lm, scope))


class TestStops:
    def test_what_was_stopped_goes_on_to_the_same_weights(self, lm, scope, tmp_path, monkeypatch):
        settings = {"mask": HALF, "checkpoint_every": 2, "weight_decay": 0.1}
        whole, _ = fit(lm, scope, folder=tmp_path / "whole", **settings)

        def stop(step):
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, folder=tmp_path / "stopped", probe=stop, **settings)
        monkeypatch.delattr(Attribution, "gradient")  # the choice is kept, not made anew
        assert_equal(fit(lm, scope, folder=tmp_path / "stopped", **settings)[0], whole)
        assert (tmp_path / "stopped/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
        assert_equal(fit(lm, scope, folder=tmp_path / "whole", **settings)[0], whole)

    def test_a_folder_of_another_mask_is_refused(self, lm, scope, tmp_path):
        fit(lm, scope, folder=tmp_path, mask=HALF)
        with pytest.raises(InvalidConfig, match=r"its method\.mask\.ratio is 0\.5, asked for is 0\.6"):
            fit(lm, scope, folder=tmp_path, mask=Mask(ratio=0.6))

    def test_a_mask_that_is_cut_short_is_told_so(self, lm, scope, tmp_path):
        fit(lm, scope, folder=tmp_path, mask=HALF)
        path = tmp_path / "mask.safetensors"
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CorruptArtifact, match=r"mask\.safetensors cannot be read"):
            fit(lm, scope, folder=tmp_path, mask=HALF)

    def test_two_processes_choose_the_same_weights_and_change_rounding_only(self, tmp_path):
        settings = {"mask": HALF, "epochs": 2}
        together(2, finetune_in, tmp_path / "two", **settings)
        finetune_in(tmp_path / "one", **settings)
        masks = [(tmp_path / n / "mask.safetensors").read_bytes() for n in ("one", "two")]
        assert masks[0] == masks[1]
        assert_equal(*(load_patch(tmp_path / n / "patch") for n in ("one", "two")), atol=2e-5)


class TestBadInput:
    @pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
    def test_a_ratio_that_is_no_share(self, ratio):
        spec = {"kind": "finetune", "objectives": ["ga"], "mask": {"score": "wagle", "ratio": ratio}}
        with pytest.raises(
            InvalidConfig, match=r"mask\.ratio: Input should be (greater than 0|less than or equal to 1)"
        ):
            Method.parse(spec)

    def test_an_adapter_beside_a_mask(self, lm, scope):
        with pytest.raises(InvalidConfig, match="an adapter adds to whole matrices, so it takes no mask"):
            fit(lm, scope, mask=HALF, adapter={"r": 2, "target_modules": ["q_proj"]})

    def test_shares_of_a_model(self, lm, scope, monkeypatch):
        monkeypatch.setattr(finetune, "is_sharded", lambda: True)
        with pytest.raises(InvalidConfig, match="a mask is made of whole gradients: launch without FSDP"):
            fit(lm, scope, mask=HALF)


def test_a_mask_reads_as_a_line_of_yaml():
    spec = {"kind": "finetune", "objectives": ["npo", "retain_nll"], "mask": {"score": "wagle", "ratio": 0.8}}
    assert Method.parse(spec).mask == Mask(score=WagleWeightScore(), ratio=0.8)
    assert Method.parse(spec | {"mask": {"score": {"kind": "wagle", "gamma_h": 1e-6}}}).mask.score.gamma_h == 1e-6
