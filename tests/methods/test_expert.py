"""Expert forgets what its routers let through, leaves the model alone, and gives the same bytes however it is run."""

from __future__ import annotations

import pytest
import torch
from conftest import FAR, make_bridge, make_hf, make_hooked, make_tokenizer, n_hooks, words
from mixtures import make_mixture
from workers import tiny_scope

from concept_unlearn.errors import InvalidConfig, InvalidData, SiteNotFound
from concept_unlearn.features.shift import feed_forward_shift, most_shifted
from concept_unlearn.lm import LM
from concept_unlearn.methods import Expert, Method, Study
from concept_unlearn.objectives import GA, RetainNLL
from concept_unlearn.patches import ExpertPatch, load_patch

LENIENT = {"false_positives": 0.05, "window": 2}


@pytest.fixture
def scope():
    return tiny_scope()


def method(**changes):
    settings = {"layers": (0, 1), "width": 8, "lr": 1e-2, "max_steps": 4, "batch_size": 4, "micro_batch": 4}
    return Expert(**settings | {"warm_up": 0, "routing": LENIENT} | changes)


def fit(lm, scope, *, probe=None, folder=None, **changes):
    """The patch, and every step's losses."""
    seen = []
    study = Study(lm, scope, folder=folder)
    patch = method(**changes).fit(study, log=lambda _, values: seen.append(values), probe=probe)
    return patch, [values for values in seen if "loss" in values]


def logits(lm, *prompts):
    with torch.no_grad():
        return torch.cat([lm.logits(torch.tensor([lm.encode(p, chat=False)]))[0] for p in prompts])


def nll(lm, passages):
    return -float(
        torch.cat([s.logprobs for s in lm.score_texts([lm.encode(p.text, chat=False) for p in passages])]).mean()
    )


class TestForgetting:
    def test_the_concept_is_forgotten_and_tokens_of_other_text_stay_bit_identical(self, planted, tmp_path):
        lm, others = planted.lm, [words(*FAR[:6]), words(*FAR[6:12])]
        before, unrelated = nll(lm, planted.scope.forget), logits(lm, *others)
        recipe = {"objectives": (GA(), RetainNLL()), "max_steps": 25, "batch_size": 24, "micro_batch": 24, "lr": 3e-2}
        patch, steps = fit(lm, planted.scope, layers=(0,), **recipe)
        loaded = load_patch(patch.save(tmp_path, lm), lm)
        assert isinstance(patch, ExpertPatch)
        assert steps[-1]["forget_nll"] > steps[0]["forget_nll"] + 0.5
        for same in (patch, loaded):
            with same.on(lm):
                assert nll(lm, planted.scope.forget) > before + 0.5
                changed = (logits(lm, *others) != unrelated).any(-1)
        assert changed.float().mean() < 0.5

    @pytest.mark.parametrize("changes", [{}, {"sticky": True}, {"rho": 1}, {"joint": True}], ids=str)
    def test_every_variant_goes_down(self, planted, changes):
        _, steps = fit(planted.lm, planted.scope, layers=(0,), max_steps=12, batch_size=24, micro_batch=24, **changes)
        assert steps[-1]["loss"] < steps[0]["loss"]

    @pytest.mark.parametrize("library", ["hooked", "bridge", "mixtral", "qwen3_moe"])
    def test_other_libraries_and_mixtures_of_experts(self, library, scope, tmp_path):
        match library:
            case "hooked":
                lm = LM(make_hooked(tmp_path))
            case "bridge":
                lm = LM(make_bridge(tmp_path))
            case _:
                lm = LM(make_mixture(library), make_tokenizer(), name=library)
        patch, _ = fit(lm, scope, layers=(0,))
        texts = [f"{p.prompt} {p.text}" for p in scope.forget]
        before = logits(lm, *texts)
        with patch.on(lm):
            assert not torch.equal(logits(lm, *texts), before)

    def test_the_default_blocks_are_the_half_that_shifts_most(self, planted):
        shift = feed_forward_shift(planted.lm, planted.scope)
        for n in (None, 2):
            patch, _ = fit(planted.lm, planted.scope, layers="shift", n_layers=n, max_steps=1)
            assert patch.layers == most_shifted(shift, n)


class TestWhatIsTrained:
    @pytest.mark.parametrize("joint", [False, True])
    def test_only_the_listed_parameters_get_gradients(self, lm, scope, joint):
        study, found = Study(lm, scope), method(joint=joint)
        with found._trainable(study) as trainable:
            names = {name.partition(".")[2] for name in trainable.parameters}
            assert names == {"w_in", "b_in", "w_out", "b_out", "calibration.w_in", "calibration.w_out"} | (
                {"router", "bias"} if joint else set()
            )
            assert all(p.requires_grad for p in trainable.parameters.values())
            assert not any(p.requires_grad for p in lm.model.parameters())
            rows = [torch.tensor([lm.encode(passage.text, chat=False)]) for passage in scope.forget]
            torch.stack([lm.logits(ids).sum() for ids in rows]).sum().backward()
            assert any(p.grad is not None for p in trainable.parameters.values())
            assert all(p.grad is None for p in lm.model.parameters())
        assert all(p.grad is None for p in trainable.parameters.values())

    @pytest.mark.parametrize("joint", [False, True])
    def test_routers_move_only_where_they_are_trained_too(self, lm, scope, joint):
        study, found = Study(lm, scope), method(joint=joint)
        start, patch = found._experts(study), found.fit(study)
        moved = {
            n
            for i, e in patch.experts.items()
            for n, p in e.named_parameters()
            if not torch.equal(p, start[i].get_parameter(n))
        }
        assert "w_out" in moved
        assert bool(moved & {"router", "bias"}) is joint
        assert all(e.threshold == start[i].threshold for i, e in patch.experts.items())

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_model_is_what_it_was_afterwards(self, lm, scope, fails):
        lm.model.train()
        weights = {n: p.clone() for n, p in lm.model.named_parameters()}
        flags = {n: (p.requires_grad, p.grad) for n, p in lm.model.named_parameters()}
        modes, hooks, random = [m.training for m in lm.model.modules()], n_hooks(lm.model), torch.random.get_rng_state()

        def fail(step):
            if step == 2 and fails:
                raise KeyboardInterrupt

        try:
            fit(lm, scope, probe=fail)
        except KeyboardInterrupt:
            assert fails
        assert all(torch.equal(p, weights[n]) for n, p in lm.model.named_parameters())
        assert {n: (p.requires_grad, p.grad) for n, p in lm.model.named_parameters()} == flags
        assert [m.training for m in lm.model.modules()] == modes
        assert n_hooks(lm.model) == hooks
        assert torch.equal(torch.random.get_rng_state(), random)

    def test_the_reference_is_the_untouched_model(self, planted):
        """NPO starts at 2 log 2 / beta, where model and reference agree, though a replacing expert is no identity."""
        _, added = fit(planted.lm, planted.scope, layers=(0,), max_steps=1)
        _, replaced = fit(planted.lm, planted.scope, layers=(0,), max_steps=1, rho=1)
        start = 2 / 0.1 * torch.tensor(2.0).log()
        torch.testing.assert_close(torch.tensor(added[0]["npo"]), start, rtol=1e-4, atol=1e-4, check_dtype=False)
        assert abs(replaced[0]["npo"] - float(start)) > 1e-3


class TestTheSameResult:
    def test_it_is_the_same_each_time_and_after_it_was_stopped(self, lm, scope, tmp_path):
        settings = {"checkpoint_every": 1, "joint": True, "routing": LENIENT}

        def stop(step):
            if step == 3:
                raise KeyboardInterrupt

        whole, steps = fit(lm, scope, **settings)
        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, probe=stop, folder=tmp_path, **settings)
        resumed, rest = fit(lm, scope, folder=tmp_path, **settings)
        again, none = fit(lm, scope, folder=tmp_path, **settings)
        assert whole.digest == resumed.digest == again.digest
        assert (len(steps), len(none)) == (4, 0)
        assert 0 < len(rest) < 4

    def test_small_parts_change_it_by_rounding_only(self, lm, scope):
        one, two = (fit(lm, scope, micro_batch=n)[0] for n in (4, 1))
        for layer in one.layers:
            for name, p in one.experts[layer].named_parameters():
                torch.testing.assert_close(p, two.experts[layer].get_parameter(name), rtol=1e-3, atol=1e-4)

    def test_routers_and_shifts_are_measured_once_a_study(self, lm, scope):
        study, seen = Study(lm, scope), []
        handle = lm.model.register_forward_pre_hook(lambda *_: seen.append(1))
        method(layers="shift")._routers(study)
        first = len(seen)
        method(layers="shift", width=3, rho=1)._routers(study)
        handle.remove()
        assert first > 0
        assert len(seen) == first


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"layers": (1, 1)}, "layers are different blocks"),
            ({"layers": ()}, "layers are different blocks"),
            ({"layers": (0,), "n_layers": 2}, "n_layers is for layers: shift"),
            ({"gradient_checkpointing": True}, "leave gradient_checkpointing off"),
            ({"rho": 2}, "rho"),
            ({"width": 0}, "width"),
            ({"routing": {"false_positives": 2}}, "false_positives"),
            ({"objectives": []}, "objectives"),
        ],
        ids=str,
    )
    def test_settings_that_make_no_sense_are_refused(self, settings, says):
        with pytest.raises(InvalidConfig, match=says):
            Method.parse({"kind": "expert"} | settings)

    @pytest.mark.parametrize("layers", [(3,), (-1,)])
    def test_a_block_that_is_not_there(self, lm, scope, layers):
        with pytest.raises(SiteNotFound, match="has layers 0 to 2"):
            fit(lm, scope, layers=layers)

    def test_more_blocks_than_there_are(self, lm, scope):
        with pytest.raises(InvalidConfig, match="n_layers is from 1 to 3"):
            fit(lm, scope, layers="shift", n_layers=4)

    @pytest.mark.parametrize("layers", ["shift", (1,)])
    def test_a_block_without_a_feed_forward(self, scope, layers):
        lm = LM(make_hf(), make_tokenizer())
        block = lm.model.model.layers[1]
        block.something = block.mlp
        del block.mlp
        with pytest.raises(SiteNotFound, match=r"no place for blocks.1"):
            fit(lm, scope, layers=layers)

    def test_routers_that_cannot_tell(self, lm, scope):
        with pytest.raises(InvalidData, match="no router tells"):
            fit(lm, scope, routing={"false_positives": 0, "floor": 0.9999})


def test_its_spec_is_short_and_complete():
    made = Expert()
    assert (made.width, made.rho, made.lr, made.layers, made.routing.false_positives) == (64, 0, 1e-4, "shift", 0.01)
    assert [o.kind for o in made.objectives] == ["npo", "retain_kl"]
    assert Method.parse(made.spec()) == made
