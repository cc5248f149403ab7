"""Finetuning: the same result however it is run, the model as it was afterwards, and every recipe at work."""

from __future__ import annotations

import json
import math
import random
import time
from itertools import pairwise

import pytest
import torch
from conftest import make_bridge, make_hf, make_hooked, make_tokenizer, words
from workers import finetune_in, finetune_sharded_in, start, tiny_finetune, tiny_scope, together

from concept_unlearn.errors import Diverged, InvalidConfig, NonFinite, UnknownName
from concept_unlearn.lm import LM
from concept_unlearn.methods import PRESETS, Finetune, Method, Study
from concept_unlearn.objectives import (
    CEU,
    GA,
    IDK,
    ME,
    NPO,
    RMU,
    UNDIAL,
    CappedGA,
    Hinge,
    Margin,
    Objective,
    RetainEmbedding,
    RetainKL,
    RetainNLL,
    TemperatureGA,
)
from concept_unlearn.patches import load_patch
from concept_unlearn.step import Read, Step
from concept_unlearn.training import PrimalDual, Watch
from concept_unlearn.training.data import make_data
from concept_unlearn.training.plan import Plan
from concept_unlearn.training.settings import Optimisation

FORGETTING = sorted(name for name, row in PRESETS.items() if row["kind"] == "finetune")
EVERY_REDUCTION = (NPO(), CappedGA(weight=0.1), Hinge(delta=20.0, weight=0.01), IDK(), RetainNLL(), RetainKL())


@pytest.fixture
def scope():
    return tiny_scope()


@pytest.fixture(scope="module")
def taught():
    """A model that knows what is to be forgotten and what is to be kept, as far as it can."""
    scope, lm = tiny_scope(), LM(make_hf(), make_tokenizer(), name="taught")
    lesson = tiny_finetune(objectives=(GA(weight=-1.0), RetainNLL()), lr=1e-2, epochs=40, retain_per_forget=2)
    with torch.no_grad():
        for name, delta in lesson(lm, scope).deltas.items():
            lm.model.get_parameter(name).add_(delta.dense())
    assert _nll(lm, scope) < 1.0
    return lm


def fit(lm, scope, *, probe=None, folder=None, **settings):
    """The patch, and every step's losses."""
    seen = []
    method = tiny_finetune(**settings)
    patch = method.fit(Study(lm, scope, folder=folder), log=lambda _, values: seen.append(values), probe=probe)
    return patch, [values for values in seen if "loss" in values]


def state(lm):
    """Everything of a model that training could leave changed."""
    return {
        "weights": {n: p.detach().clone() for n, p in lm.model.named_parameters()},
        "storage": {n: p.data_ptr() for n, p in lm.model.named_parameters()},
        "flags": {n: (p.requires_grad, p.grad) for n, p in lm.model.named_parameters()},
        "modes": {n: (m.training, type(m)) for n, m in lm.model.named_modules()},
        "attributes": set(vars(lm.model)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()),
        "random": torch.random.get_rng_state(),
    }


def assert_as_before(lm, before):
    after = state(lm)
    for key in ("weights", "flags"):
        assert before[key].keys() == after[key].keys()
    assert all(torch.equal(before["weights"][n], w) for n, w in after["weights"].items())
    assert all(before["flags"][n][0] == f[0] and before["flags"][n][1] is f[1] for n, f in after["flags"].items())
    assert all(before[key] == after[key] for key in ("storage", "modes", "attributes", "hooks"))
    assert torch.equal(before["random"], after["random"])


def assert_close(a, b, **tolerance):
    assert a.deltas.keys() == b.deltas.keys()
    for name in a.deltas:
        torch.testing.assert_close(a.deltas[name].dense(), b.deltas[name].dense(), **tolerance)


def assert_equal(a, b):
    assert_close(a, b, rtol=0, atol=0)


class TestTheModelAfterwards:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}, {"gradient_checkpointing": True}],
        ids=["full", "lora", "checkpointed"],
    )
    def test_it_is_what_it_was_to_the_last_bit_and_flag(self, lm, scope, settings):
        lm.model.train()
        weight = next(lm.model.parameters())
        weight.requires_grad_(False)
        weight.grad = torch.ones_like(weight)
        before = state(lm)
        fit(lm, scope, **settings)
        assert_as_before(lm, before)

    @pytest.mark.parametrize("adapter", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["full", "lora"])
    def test_so_it_is_after_an_exception(self, lm, scope, adapter):
        before = state(lm)

        def fail(step):
            if step == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, adapter=adapter, probe=fail)
        assert_as_before(lm, before)

    def test_an_adapter_that_would_leave_its_mark_is_refused(self, lm, scope):
        q = {"target_modules": ["q_proj"]}
        for settings, says in [
            (q | {"init_lora_weights": "pissa"}, "begins by changing"), (q | {"bias": "lora_only"}, None),
            ({"peft_type": "LN_TUNING", "target_modules": ["norm"]}, "no change of weights"),
            (q | {"layer_replication": [[0, 3], [0, 3]]}, "no change of weights"),
            (q | {"trainable_token_indices": [3]}, "no change of weights"),
            (q | {"lora_bias": True}, "no change of weights"),
        ]:  # fmt: skip
            before = state(lm)
            if says is None:
                fit(lm, scope, adapter=settings)
            else:
                with pytest.raises(InvalidConfig, match=f"adapter: .*{says}"):
                    fit(lm, scope, adapter=settings)
            assert_as_before(lm, before)

    def test_an_adapter_of_biases_or_of_tied_weights_is_refused(self, scope):
        lm = LM(make_hf("gpt2"), make_tokenizer())
        before = state(lm)
        with pytest.raises(InvalidConfig, match=r"adapter: it would train .*bias itself"):
            fit(lm, scope, adapter={"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True})
        with pytest.raises(InvalidConfig, match=r"adapter: transformer\.wte\.weight is also lm_head\.weight"):
            fit(lm, scope, adapter={"target_modules": ["wte"]})
        assert_as_before(lm, before)

    def test_a_model_that_has_an_adapter_keeps_it(self, lm, scope, ids):
        import peft

        lm.model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        with torch.no_grad():
            want = lm.logits(ids)
        with pytest.raises(InvalidConfig, match="this model has one already"):
            fit(lm, scope, adapter={"target_modules": ["q_proj"]})
        with torch.no_grad():
            assert torch.equal(lm.logits(ids), want)

    def test_half_precision_is_trained_in_full_and_put_back(self, scope):
        lm = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="half")
        before = state(lm)
        patch, _ = fit(lm, scope, lr=1e-4, store="float32")
        assert_as_before(lm, before)
        full, _ = fit(LM(make_hf().to(torch.bfloat16).float(), make_tokenizer(), name="full"), scope, lr=1e-4)
        moved, want = (
            math.sqrt(sum(float(d.dense().square().sum()) for d in p.deltas.values())) for p in (patch, full)
        )
        assert moved == pytest.approx(want, rel=0.1)


class TestTheResult:
    @pytest.mark.parametrize(
        "adapter",
        [
            None, {"r": 2, "target_modules": ["q_proj", "down_proj"]},
            {"r": 2, "use_rslora": True, "target_modules": ["q_proj"]},
            {"r": 2, "use_dora": True, "target_modules": ["q_proj"]},
            {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "lm_head"]},
            {"peft_type": "IA3", "target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ],
        ids=["full", "lora", "rslora", "dora", "head", "ia3"],
    )  # fmt: skip
    def test_the_patch_is_the_trained_model(self, lm, scope, ids, adapter):
        last = {}

        @torch.no_grad()
        def look(step):
            last[step] = lm.logits(ids)

        patch, losses = fit(lm, scope, adapter=adapter, probe=look)
        with torch.no_grad(), patch.on(lm):
            torch.testing.assert_close(lm.logits(ids), last[len(losses)], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(last[0], last[len(losses)], atol=1e-3)

    def test_lora_on_a_transposed_layer_is_the_trained_model(self, scope, ids):
        lm, last = LM(make_hf("gpt2"), make_tokenizer(), name="gpt2"), []
        patch, _ = fit(lm, scope, adapter={"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
                       probe=lambda _: last.append(lm.logits(ids).detach()))  # fmt: skip
        with torch.no_grad(), patch.on(lm):
            torch.testing.assert_close(lm.logits(ids), last[-1], rtol=1e-4, atol=1e-4)

    def test_an_adapters_change_is_kept_as_its_factors(self, lm, scope):
        patch, _ = fit(lm, scope, adapter={"r": 2, "target_modules": ["q_proj"]})
        assert set(patch.deltas) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
        assert {d.kind for d in patch.deltas.values()} == {"low_rank"}

    def test_only_the_parameters_asked_for_are_changed(self, lm, scope):
        patch, _ = fit(lm, scope, parameters=("model.layers.[12].mlp.*",))
        assert set(patch.deltas) == {n for n, _ in lm.model.named_parameters() if ".mlp." in n and "layers.0" not in n}

    @pytest.mark.parametrize("kind", ["gpt2", "gemma2", "hooked", "bridge"])
    def test_it_forgets_on_every_kind_of_model(self, kind, scope, tmp_path):
        model = {"hooked": make_hooked, "bridge": make_bridge}.get(kind, lambda _: make_hf(kind))(tmp_path)
        lm = LM(model) if kind in ("hooked", "bridge") else LM(model, make_tokenizer())
        _, losses = fit(lm, scope, objectives=(GA(), RetainNLL()), lr=3e-3, batch_size=16)
        assert losses[-1]["forget_nll"] > losses[0]["forget_nll"] + 0.1

    def test_a_saved_patch_does_the_same(self, lm, scope, ids, tmp_path):
        patch, _ = fit(lm, scope, store="bfloat16")
        patch.save(tmp_path / "patch", lm)
        again = load_patch(tmp_path / "patch", lm)
        with torch.no_grad(), patch.on(lm):
            want = lm.logits(ids)
        with torch.no_grad(), again.on(lm):
            assert torch.equal(lm.logits(ids), want)

    def test_what_was_unlearned_can_be_relearned_on_top(self, lm, scope):
        forgot, losses = fit(lm, scope, objectives=(GA(),), lr=5e-3)
        with forgot.on(lm):
            _, again = fit(lm, scope, objectives=(GA(weight=-1.0),), lr=5e-3)
        assert again[0]["forget_nll"] > losses[0]["forget_nll"]
        assert again[-1]["forget_nll"] < again[0]["forget_nll"]

    @pytest.mark.parametrize("name", FORGETTING)
    @pytest.mark.filterwarnings("ignore:.* are left out")
    def test_every_recipe_forgets(self, taught, scope, name):
        method = Method.parse({"preset": name, "lr": 5e-3, "epochs": 5, "batch_size": 5, "max_steps": None})
        patch = method(taught, scope)
        assert _nll_of(taught, patch, scope) > 1.1 * _nll(taught, scope)


def _nll(lm, scope):
    split = make_data(lm, scope, ["forget"], Optimisation()).splits["forget"]
    batch = split.batch(range(len(split.rows)))
    with torch.no_grad():
        return float(Step(lm, {"forget": batch}, [Read("forget")]).nll("forget").mean())


class TestHoweverItIsRun:
    @pytest.mark.parametrize("micro_batch", [1, 3])
    def test_accumulation_changes_rounding_only(self, lm, scope, micro_batch):
        whole, losses = fit(lm, scope, objectives=EVERY_REDUCTION, micro_batch=64)
        parts, again = fit(lm, scope, objectives=EVERY_REDUCTION, micro_batch=micro_batch)
        for a, b in zip(losses, again, strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=1e-5)
        assert_close(parts, whole, rtol=0, atol=2e-4)

    @pytest.mark.parametrize("n", [7, 8, 9])
    def test_an_uneven_end_counts_for_what_it_is(self, n):
        scope = tiny_scope(n)
        lm = LM(make_hf().double(), make_tokenizer())
        whole, losses = fit(lm, scope, batch_size=4, micro_batch=4)
        parts, _ = fit(lm, scope, batch_size=4, micro_batch=1)
        assert len(losses) == 3 * math.ceil(n / 4)
        assert_close(parts, whole, rtol=0, atol=1e-9)

    def test_two_processes_change_rounding_only(self, tmp_path):
        together(2, finetune_in, tmp_path / "two")
        finetune_in(tmp_path / "one")
        one, two = (load_patch(tmp_path / n / "patch") for n in ("one", "two"))
        assert_close(one, two, rtol=0, atol=2e-5)
        curves = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("one", "two")]
        assert len(curves[0]) == len(curves[1]) > 3

    @pytest.mark.parametrize(
        "objectives",
        [EVERY_REDUCTION, (RMU(k=2.0), RetainEmbedding())],
        ids=["every reduction", "representations"],
    )
    def test_two_processes_with_a_share_each_change_rounding_only(self, tmp_path, objectives):
        settings = {"objectives": objectives, "micro_batch": 3, "checkpoint_every": 2, "watch": Watch(keep=0.01)}
        together(2, finetune_sharded_in, tmp_path / "two", 3, **settings)
        together(2, finetune_sharded_in, tmp_path / "two", None, **settings)
        lm = LM(make_hf().double(), make_tokenizer(), name="tiny")
        one, _ = fit(lm, tiny_scope(), folder=tmp_path / "one", **settings)
        curves = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("one", "two")]
        for a, b in zip(*([json.loads(line) for line in lines] for lines in curves), strict=True):
            assert a == pytest.approx(b, rel=1e-7)
        assert_close(one, load_patch(tmp_path / "two" / "patch"), rtol=0, atol=1e-7)

    def test_gradient_checkpointing_changes_nothing(self, lm, scope):
        assert_close(fit(lm, scope)[0], fit(lm, scope, gradient_checkpointing=True)[0], rtol=0, atol=1e-6)

    def test_a_part_of_a_half_precision_model_is_not_trained_in_full_precision(self, scope):
        half = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="half")
        with pytest.raises(InvalidConfig, match="load the model in float32, or leave precision at auto"):
            tiny_finetune(precision="fp32", parameters=("*mlp*",))(half, scope)

    def test_half_precision_looks_at_the_same_reference(self, scope):
        """Autocast would keep the cast of a weight after another was put in its place, and KL would see itself."""
        half, full = (LM(make_hf().to(torch.bfloat16).to(d), make_tokenizer()) for d in (torch.bfloat16, torch.float32))
        settings = {"objectives": (GA(), RetainKL()), "parameters": ("lm_head.weight",), "lr": 3e-2}
        seen, want = ([values["retain_kl"] for values in fit(lm, scope, **settings)[1]] for lm in (half, full))
        assert want[-1] > 0.05
        assert seen == pytest.approx(want, rel=0.2, abs=2e-3)

    def test_a_caller_without_gradients_changes_nothing(self, lm, scope):
        want, _ = fit(lm, scope)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found, _ = fit(lm, scope)
            assert_equal(found, want)

    def test_dropout_is_off(self, scope):
        lm, quiet = LM(make_hf("gpt2"), make_tokenizer()), LM(make_hf("gpt2"), make_tokenizer())
        for module in quiet.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        lm.model.train()
        assert_equal(fit(lm, scope)[0], fit(quiet, scope)[0])

    def test_a_seed_is_one_result_and_another_seed_another(self, lm, scope):
        one, again, other = (fit(lm, scope, seed=s)[0] for s in (0, 0, 1))
        assert_equal(one, again)
        assert any(not torch.equal(one.deltas[n].dense(), other.deltas[n].dense()) for n in one.deltas)

    def test_no_pass_is_made_twice(self, lm, scope):
        calls = []
        handle = lm.model.model.register_forward_hook(lambda *_: calls.append(1))
        _, losses = fit(lm, scope, objectives=(NPO(), RetainNLL(), RetainKL()), batch_size=4, micro_batch=4)
        handle.remove()
        n_forget, n_retain = len(scope.forget), len((*scope.near, *scope.retain))
        assert len(calls) == 2 * len(losses) + math.ceil(n_forget / 8) + math.ceil(n_retain / 8)


class TestStops:
    def test_what_was_stopped_goes_on_to_the_same_weights(self, lm, scope, tmp_path):
        settings = {"objectives": EVERY_REDUCTION, "checkpoint_every": 2, "balance": PrimalDual(warm_up=0)}
        whole, losses = fit(lm, scope, folder=tmp_path / "whole", **settings)

        def stop(step):
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, folder=tmp_path / "stopped", probe=stop, **settings)
        again, rest = fit(lm, scope, folder=tmp_path / "stopped", **settings)
        assert len(rest) == len(losses) - 4
        assert_equal(again, whole)
        assert (tmp_path / "stopped/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()

    def test_killed_five_times_it_ends_with_the_same_weights(self, tmp_path):
        began = time.perf_counter()
        finetune_in(tmp_path / "whole")
        seconds, rng = time.perf_counter() - began, random.Random(1)
        for _ in range(5):
            process = start(finetune_in, tmp_path / "killed")
            time.sleep(rng.uniform(0.2, 0.2 + seconds / 2))
            process.kill()
            process.join()
        finetune_in(tmp_path / "killed")
        assert_equal(load_patch(tmp_path / "killed/patch"), load_patch(tmp_path / "whole/patch"))
        assert (tmp_path / "killed/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()

    def test_an_adapter_goes_on_too(self, lm, scope, tmp_path):
        settings = {"adapter": {"r": 2, "target_modules": ["q_proj"]}, "checkpoint_every": 2}
        whole, _ = fit(lm, scope, **settings)

        def stop(step):
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, folder=tmp_path, probe=stop, **settings)
        assert_equal(fit(lm, scope, folder=tmp_path, **settings)[0], whole)

    def test_what_is_finished_is_not_trained_again(self, lm, scope, tmp_path):
        first, _ = fit(lm, scope, folder=tmp_path)
        again, losses = fit(lm, scope, folder=tmp_path)
        assert losses == []
        assert_equal(again, first)

    def test_less_memory_may_be_asked_for_on_the_way(self, lm, scope, tmp_path):
        def stop(step):
            if step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(lm, scope, folder=tmp_path, probe=stop, checkpoint_every=2)
        smaller = {"micro_batch": 1, "gradient_checkpointing": True}
        assert_close(fit(lm, scope, folder=tmp_path, **smaller)[0], fit(lm, scope)[0], rtol=0, atol=1e-5)

    def test_a_folder_of_another_training_is_refused(self, lm, scope, tmp_path):
        fit(lm, scope, folder=tmp_path)
        with pytest.raises(InvalidConfig, match=r"another finetuning \(its method\.lr is 0\.003, asked for is 0\.1\)"):
            fit(lm, scope, folder=tmp_path, lr=0.1)


class TestASteps:
    def test_first_loss_is_the_objectives_value_at_the_reference(self, lm, scope):
        _, losses = fit(lm, scope, objectives=(NPO(beta=0.1), RetainKL()))
        assert losses[0]["npo"] == pytest.approx(20 * math.log(2), rel=1e-5)
        assert losses[0]["retain_kl"] == pytest.approx(0, abs=1e-6)
        assert losses[1]["retain_kl"] > 1e-4

    def test_learning_rate_rises_in_the_first_epoch_and_falls_to_the_end(self, lm, scope):
        _, losses = fit(lm, scope, lr=1e-3, epochs=3, batch_size=3)
        rates = [values["lr"] for values in losses]
        assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
        assert all(a > b for a, b in pairwise(rates[4:]))
        assert rates[-1] == pytest.approx(1e-3 / 8)

    def test_no_part_of_a_step_lacks_what_an_objective_reads(self, lm, scope):
        class Both(Objective):
            """Reads both sides."""

            def reads(self, lm):
                return (Read("forget"), Read("retain"))

            def __call__(self, step):
                return step.token_mean("retain", step.nll("retain")) - step.token_mean("forget", step.nll("forget"))

        try:
            both, _ = fit(lm, scope, objectives=(Both(),), retain_per_forget=4, micro_batch=1)
            apart, _ = fit(lm, scope, objectives=(GA(), RetainNLL()), retain_per_forget=4)
        finally:
            del Objective.members["both"]
        assert_close(both, apart, rtol=0, atol=1e-5)

    def test_max_steps_stands_in_for_epochs(self, lm, scope):
        assert len(fit(lm, scope, max_steps=2)[1]) == 2

    def test_each_retained_row_comes_once_before_any_comes_twice(self, lm, scope, monkeypatch):
        taken, items = [], Plan.items
        monkeypatch.setattr(Plan, "items", lambda self, step: taken.append(items(self, step)) or taken[-1])
        fit(lm, scope, epochs=4)
        rows = [i for step in taken for i in step["retain"]]
        n = len((*scope.near, *scope.retain))
        assert sorted(rows[:n]) == list(range(n))
        assert [sorted(i for step in taken[k : k + 3] for i in step["forget"]) for k in (0, 3)] == [list(range(10))] * 2

    @pytest.mark.parametrize("objective", [TemperatureGA(), CEU(), UNDIAL(), Margin(), ME()], ids=lambda o: o.kind)
    def test_plain_loss_is_logged_beside_an_objective_that_reads_logits(self, lm, scope, objective):
        settings = {"lr": 1e-9, "max_steps": 2, "micro_batch": 2}
        want = fit(lm, scope, objectives=(GA(), RetainNLL()), **settings)[1]
        seen = fit(lm, scope, objectives=(objective, RetainKL()), **settings)[1]
        for a, b in zip(seen, want, strict=True):
            assert (a["forget_nll"], a["retain_nll"]) == pytest.approx((b["forget_nll"], b["retain_nll"]), rel=1e-5)


class TestBalance:
    def test_without_a_step_it_is_a_fixed_weight(self, lm, scope):
        dual, _ = fit(lm, scope, balance=PrimalDual(alpha=3.0, eta=0.0))
        assert_equal(dual, fit(lm, scope, objectives=(GA(), RetainNLL(weight=3.0)))[0])

    def test_alpha_rises_while_too_much_is_lost_and_never_falls_below_zero(self, lm, scope):
        rising = fit(lm, scope, balance=PrimalDual(alpha=1.0, eps=0.0, warm_up=0))[1]
        assert all(a["alpha"] < b["alpha"] for a, b in pairwise(rising))
        falling = fit(lm, scope, balance=PrimalDual(alpha=1.0, eps=100.0, warm_up=0))[1]
        assert [values["alpha"] for values in falling[1:]] == [0.0] * (len(falling) - 1)

    def test_the_warm_up_leaves_it_and_is_at_most_half_the_run(self, lm, scope):
        losses = fit(lm, scope, balance=PrimalDual(alpha=1.0, eps=0.0))[1]
        alphas = [values["alpha"] for values in losses]
        half = len(alphas) // 2
        assert alphas[:half] == [1.0] * half
        assert alphas[-1] > 1.0

    def test_what_is_asked_for_is_a_tenth_above_the_untouched_models_loss(self, lm, scope):
        seen = fit(lm, scope, balance=PrimalDual(alpha=1.0, warm_up=0, every="epoch"), lr=1e-9)[1]
        at_start = (1.0 - seen[-1]["alpha"]) / 2  # two epochs have ended before the last step
        data = make_data(lm, scope, ["retain"], Optimisation())
        batch = data.splits["retain"].batch(range(len(data.splits["retain"].rows)))
        risk = RetainNLL()(Step(lm, {"retain": batch}, [Read("retain")])).item()
        assert at_start == pytest.approx(0.1 * risk, rel=1e-2)


class TestWatch:
    def test_what_is_held_out_is_never_trained_on(self, lm, scope):
        data = make_data(lm, scope, ["forget", "retain"], tiny_finetune(watch=Watch()))
        assert len(data.held["retain"]) == len(scope.retain) // 10
        assert not set(data.held["retain"]) & set(data.items["retain"])

    def test_it_stops_when_too_little_is_kept_and_leaves_the_best(self, taught, scope, tmp_path):
        settings = {"objectives": (GA(),), "lr": 1e-3, "epochs": 20, "watch": Watch(every=1 / 3, keep=0.8, patience=2)}
        name, at = "model.layers.1.mlp.up_proj.weight", {}

        def look(step):
            at[step] = taught.model.get_parameter(name).detach().clone()

        patch, losses = fit(taught, scope, folder=tmp_path, probe=look, **settings)
        lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        seen = {
            line["step"]: (line["watched_forget"], line["watched_retain"]) for line in lines if "watched_forget" in line
        }
        enough = {step for step, (_, kept) in seen.items() if kept >= 0.8 * _probability(taught, scope)}
        assert len(losses) < 60
        assert {len(losses), len(losses) - 1}.isdisjoint(enough)
        best = min(enough, key=lambda step: seen[step][0])
        torch.testing.assert_close(patch.deltas[name].dense(), at[best] - at[0])
        assert_equal(fit(taught, scope, folder=tmp_path, **settings)[0], patch)

    def test_it_says_when_nothing_keeps_enough(self, lm, scope):
        with pytest.warns(UserWarning, match=r"no step kept 99% .* keeps \d+%"):
            fit(lm, scope, objectives=(GA(),), lr=3e-2, watch=Watch(keep=0.99))


def _nll_of(lm, patch, scope):
    with patch.on(lm):
        return _nll(lm, scope)


def _probability(lm, scope):
    """Of the retained answers that a watch holds out."""
    data = make_data(lm, scope, ["retain"], tiny_finetune(watch=Watch()))
    batch = data.splits["retain"].batch(data.held["retain"])
    with torch.no_grad():
        step = Step(lm, {"retain": batch}, [Read("retain")])
        return float((-step.per_sequence("retain", step.nll("retain")) / batch.lengths()).exp().mean())


class TestBadInput:
    def test_a_learning_rate_that_diverges_says_at_which_step(self, lm, scope):
        before = state(lm)
        with pytest.raises((Diverged, NonFinite), match=r"step \d of \d, learning rate .*: try a lower learning rate"):
            fit(lm, scope, objectives=(GA(), RetainNLL()), lr=50.0, clip=None)
        assert_as_before(lm, before)

    def test_a_pattern_that_matches_nothing_names_what_there_is(self, lm, scope):
        with pytest.raises(UnknownName, match=r"no parameter named 'layers\.9\*'; known: .*model\.norm\.weight"):
            fit(lm, scope, parameters=("layers.9*",))

    @pytest.mark.parametrize(
        ("adapter", "says"),
        [
            ({"target_modules": ["nowhere"]}, "nowhere"),
            ({"rank": 3}, "rank"),
            ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "change of weights"),
            ({"peft_type": "LORE"}, "LORE"),
        ],
    )
    def test_an_adapter_that_fits_nothing_is_told_so(self, lm, scope, adapter, says):
        before = state(lm)
        with pytest.raises(InvalidConfig, match=f"adapter: .*{says}"):
            fit(lm, scope, adapter=adapter)
        assert_as_before(lm, before)

    def test_overlapping_sets_are_counted(self, scope):
        with pytest.warns(UserWarning, match="1 of 10 passages to forget are also to be kept"):
            type(scope)(scope.name, forget=scope.forget, retain=(*scope.retain, scope.forget[3]))

    def test_objectives_that_do_not_go_together_are_told_so(self, lm, scope):
        for settings, says in [
            ({"objectives": (GA(), GA())}, "two objectives are equal"),
            ({"objectives": (GA(),), "balance": PrimalDual()}, "needs an objective that retains"),
        ]:
            with pytest.raises(ValueError, match=says):
                tiny_finetune(**settings)
        with pytest.raises(InvalidConfig, match=r"balance\.eps: .* say how much it may cost"):
            fit(lm, scope, objectives=(GA(), RetainKL()), balance=PrimalDual())

    def test_quantised_weights_are_refused(self, lm, scope):
        lm.model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(32, 16).to(torch.int8), False)
        with pytest.raises(InvalidConfig, match=r"layers\.0\.mlp\.up_proj\.weight and 0 others are quantised"):
            fit(lm, scope)

    def test_deepspeed_is_refused(self, lm, scope, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(InvalidConfig, match="ACCELERATE_USE_DEEPSPEED is set"):
            fit(lm, scope)

    def test_an_adapter_and_parameters_exclude_each_other(self, lm, scope):
        with pytest.raises(InvalidConfig, match="target_modules"):
            fit(lm, scope, adapter={"r": 2}, parameters=("*",))

    def test_passages_without_an_alternate_are_left_out_with_a_count(self, lm):
        scope = tiny_scope()
        forget = tuple(
            p.model_copy(update={"alternates": (words(9, 9),)} if i else {}) for i, p in enumerate(scope.forget)
        )
        lm.generate = lambda prompts, **_: [scope.forget[0].text] * len(prompts)
        with pytest.warns(UserWarning, match="1 of 10 passages are left out"):
            data = make_data(
                lm, type(scope)("s", forget=forget, retain=scope.retain), ["alternate", "forget"], Optimisation()
            )
        assert len(data.splits["alternate"].rows) == len(data.items["forget"]) == 9


def test_a_method_is_its_spec():
    made = Finetune(objectives=("npo", {"kind": "retain_kl", "weight": 2.0}), lr=1e-5)
    assert made.objectives == (NPO(), RetainKL(weight=2.0))
    assert Method.parse(made.spec()) == made
