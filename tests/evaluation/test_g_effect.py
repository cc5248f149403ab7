"""The G-effect is the slope of the risk along the objective's gradient, split exactly, measured without a trace."""

from __future__ import annotations

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, make_hf, make_tokenizer, n_hooks, words

from concept_unlearn.data.encode import encode_text
from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import EmptyData, InvalidConfig, UnknownName
from concept_unlearn.evaluation.g_effect import g_effect, pg_effect, trace_g_effect
from concept_unlearn.lm import LM
from concept_unlearn.methods.base import Study
from concept_unlearn.methods.finetune import Finetune
from concept_unlearn.objectives import (
    DPO,
    GA,
    IDK,
    NPO,
    RMU,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    AnswerPreservation,
    Hinge,
    RetainKL,
    RetainNLL,
    SimNPO,
)

pytestmark = pytest.mark.filterwarnings("ignore:cut to max_length")
GROUPS = ("embed", "shallow", "middle", "deep", "head")


def exact(kind: str = "gpt2", seed: int = 0) -> LM:
    """In float64, which GPT-2 keeps to all the way through, its tied embedding included."""
    return LM(make_hf(kind, seed).double(), make_tokenizer(), name=kind)


def texts(n: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (n,), generator=generator).tolist()
    return [words(*torch.randint(7, 48, (length,), generator=generator).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def scope():
    return Scope.of("tiny", forget=texts(12, 1), retain=texts(14, 2), out_far=[])


@pytest.fixture(scope="module")
def questions():
    """Where other splits are made of."""
    forget, retain = ([t.partition(" ") for t in texts(6, seed)] for seed in (3, 4))
    return Scope.of(
        "asked",
        forget=[{"prompt": q, "text": a, "alternates": [words(30, 31)]} for q, _, a in forget],
        retain=[{"prompt": q, "text": a} for q, _, a in retain],
        out_far=[],
    )


# What it should be, from logits and nothing else.


def losses(lm, passages, which):
    """Of each passage the losses of its tokens."""
    found = []
    for i in which:
        ids = torch.tensor([encode_text(lm.tokenizer, passages[i].text)])
        found.append(F.cross_entropy(lm.logits(ids)[0, :-1], ids[0, 1:], reduction="none"))
    return found


def mean_nll(lm, passages, which):
    return torch.cat(losses(lm, passages, which)).mean()


def by_hand(objective, c, c0):
    """An objective of token losses, those of the model and of its reference."""
    every, every0 = torch.cat(c), torch.cat(c0)
    known = every.detach()
    match objective.kind:
        case "ga":
            return -every.mean()
        case "wga":
            return -((-objective.beta * known).exp() * every).mean()
        case "npo":
            gaps = torch.stack([one.sum() - other.sum() for one, other in zip(c, c0, strict=True)])
            return -2 / objective.beta * F.logsigmoid(objective.beta * gaps).mean()
        case "tnpo":
            return -(2 * torch.sigmoid(objective.beta * (every0 - known)) * every).mean()
        case "wtnpo":
            q, q0 = (-known).exp(), (-every0).exp()
            w = 2 * q ** (objective.beta + objective.a) / (q**objective.beta + q0**objective.beta)
            return -(w * every).mean()


def gradient(value, parameters):
    return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)


def dot(one, other):
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


@torch.no_grad()
def slope(fn, parameters, direction, h):
    """By finite differences, right to the fourth order."""
    start = [p.clone() for p in parameters]

    def at(x):
        for p, s, d in zip(parameters, start, direction, strict=True):
            p.copy_(s + x * d)
        return float(fn())

    found = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    at(0)
    return found


OBJECTIVES = [GA(), WGA(beta=2), NPO(beta=0.5), TNPO(beta=2), WTNPO(beta=1, a=0.5)]
LABELS = ["ga", "wga(beta=2.0)", "npo(beta=0.5)", "tnpo(beta=2.0)", "wtnpo(beta=1.0, a=0.5)"]


@pytest.fixture(scope="module")
def measured(scope):
    lm, reference = exact(seed=0), exact(seed=1)
    return lm, reference, g_effect(lm, scope, OBJECTIVES, reference=reference, batches=3, batch_size=2)


@pytest.mark.parametrize(("objective", "label"), list(zip(OBJECTIVES, LABELS, strict=True)), ids=LABELS)
def test_it_is_the_slope_of_the_risk_along_the_gradient_of_the_objective(measured, scope, objective, label):
    lm, reference, found = measured
    parameters, passages = list(lm.model.parameters()), found.settings["passages"]
    mine, theirs = (losses(m, scope.forget, passages["objectives"]["forget"]) for m in (lm, reference))
    direction = gradient(by_hand(objective, mine, [c.detach() for c in theirs]), parameters)
    h = 2e-3 / math.sqrt(dot(direction, direction))
    for side, effect in (("forget", found.at(label).unlearning), ("retain", found.at(label).retaining)):
        own = getattr(scope, side)
        expected = slope(lambda own=own, s=side: mean_nll(lm, own, passages["risk"][s]), parameters, direction, h)
        assert effect == pytest.approx(expected, rel=1e-7)


def test_of_the_same_passages_the_unlearning_effect_of_ascent_is_minus_the_squared_gradient(scope):
    lm = exact()
    found = g_effect(lm, scope, GA(), same_batches=True, batches=4, batch_size=3)
    parameters = list(lm.model.parameters())
    g = gradient(mean_nll(lm, scope.forget, range(12)), parameters)
    assert sorted(found.settings["passages"]["risk"]["forget"]) == list(range(12))
    assert found.at().unlearning == pytest.approx(-dot(g, g), rel=1e-10)


def test_otherwise_the_risk_and_the_objective_read_different_passages(measured, scope):
    passages = measured[2].settings["passages"]
    assert len(passages["risk"]["forget"]) == len(passages["objectives"]["forget"]) == 6
    assert not set(passages["risk"]["forget"]) & set(passages["objectives"]["forget"])
    kept = g_effect(exact(), scope, RetainNLL(), batches=9, batch_size=9).settings["passages"]
    assert sorted(kept["risk"]["retain"] + kept["objectives"]["retain"]) == list(range(14))


# Where it is.


def sums_up(found):
    for row in (r for r in found.rows if r.level == "total"):
        of = [r for r in found.rows if (r.step, r.objective) == (row.step, row.objective)]
        for level in ("group", "layer"):
            parts = [r for r in of if r.level == level]
            assert sum(r.unlearning for r in parts) == pytest.approx(row.unlearning, rel=1e-9)
            assert sum(r.retaining for r in parts) == pytest.approx(row.retaining, rel=1e-9)
    return [[r.part for r in of if r.level == level] for level in ("group", "layer")]


ENDS = {
    "llama": (["embed_tokens"], ["model.norm", "lm_head"]),
    "gpt2": (["wte", "wpe"], ["ln_f"]),
    "gpt_neox": (["embed_in"], ["final_layer_norm", "lm_head"]),
    "gemma2": (["embed_tokens"], ["model.norm"]),
    "qwen2": (["embed_tokens"], ["model.norm", "lm_head"]),
    "opt": (["embed_tokens", "embed_positions"], ["decoder.final_layer_norm"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_add_up_and_tied_weights_count_once_under_the_embedding(kind, scope):
    lm = exact(kind)
    found = g_effect(lm, scope, GA(), same_batches=True, batches=4, batch_size=3, errors=False)
    assert sums_up(found) == [list(GROUPS), ["embed", "0", "1", "2", "head"]]
    named = dict(lm.model.named_parameters())
    g = gradient(mean_nll(lm, scope.forget, range(12)), list(named.values()))
    for part, own in zip(("embed", "head"), ENDS[kind], strict=True):
        squares = [float(x.square().sum()) for n, x in zip(named, g, strict=True) if any(o in n for o in own)]
        assert all(any(o in n for n in named) for o in own)
        assert found.at(part=part).unlearning == pytest.approx(-sum(squares), rel=1e-5)
    assert found.at().unlearning == pytest.approx(-dot(g, g), rel=1e-5)


def test_every_library_measures_and_says_where(any_lm, scope):
    found = g_effect(any_lm, scope, [GA(), RetainNLL()], batches=2, batch_size=2)
    assert sums_up(found) == [list(GROUPS), ["embed", "0", "1", "2", "head"]]
    assert found.at("ga", "head").unlearning != 0 != found.at("ga", "embed").unlearning
    assert all(math.isfinite(x) for row in found.rows for x in row[4:])


def test_padding_and_the_cut_into_batches_change_nothing(scope):
    lm, settings = exact(), {"same_batches": True, "errors": False}
    one, *others = (g_effect(lm, scope, OBJECTIVES, batches=n, batch_size=12 // n, **settings).rows for n in (12, 4, 1))
    for other in others:
        assert [r[4:6] for r in other] == [pytest.approx(r[4:6], rel=1e-9, abs=1e-12) for r in one]


def test_the_order_of_the_passages_changes_nothing_where_all_are_read(scope):
    turned = Scope.of("turned", forget=scope.forget[::-1], retain=scope.retain[::-1], out_far=[])
    one, other = (
        g_effect(exact(), s, NPO(), same_batches=True, batches=7, batch_size=2, seed=seed).at()
        for s, seed in ((scope, 0), (turned, 5))
    )
    assert other[4:6] == pytest.approx(one[4:6], rel=1e-9)


def test_several_objectives_at_once_give_what_each_gives_alone(questions):
    lm = exact()
    several = [
        GA(),
        NPO(),
        Hinge(delta=40),
        IDK(),
        DPO(preferred="alternate"),
        RMU(),
        RetainNLL(),
        AnswerPreservation(),
    ]
    together = g_effect(lm, questions, several, batches=2, batch_size=2)
    for objective, name in zip(several, together.objectives, strict=True):
        alone = g_effect(lm, questions, objective, batches=2, batch_size=2)
        assert any(r.unlearning for r in alone.rows)
        for one, other in zip((r for r in together.rows if r.objective == name), alone.rows, strict=True):
            assert one[:4] == other[:4]
            assert one[4:] == pytest.approx(other[4:], rel=1e-6, abs=1e-12)


# What the theory says.


@pytest.mark.parametrize(("one", "other"), [(TNPO(), GA()), (WTNPO(a=1.5), WGA(beta=1.5))], ids=["tnpo", "wtnpo"])
def test_on_the_untouched_model_a_token_wise_preference_is_weighted_ascent(scope, one, other):
    found = g_effect(exact(), scope, [one, other], batches=3, batch_size=2)
    first, second = ([r[4:] for r in found.rows if r.objective == name] for name in found.objectives)
    assert first == [pytest.approx(r, rel=1e-9) for r in second]


@pytest.mark.parametrize("objective", [NPO(beta=0.5), GA(), SimNPO(beta=0.3)], ids=lambda o: o.kind)
def test_the_effect_is_the_weighted_mean_of_those_of_single_passages(scope, objective):
    lm, reference, settings = exact(seed=0), exact(seed=1), {"batches": 3, "batch_size": 2, "seed": 3}
    whole = g_effect(lm, scope, objective, reference=reference, **settings)
    single = pg_effect(lm, scope, objective, reference=reference, **settings)
    assert [p.passage for p in single.points] == whole.settings["passages"]["objectives"]["forget"]
    assert (single.unlearning, single.retaining) == pytest.approx(whole.at()[4:6], rel=1e-9)


def test_the_weights_of_passages_are_those_of_npo(scope):
    lm, reference = exact(seed=0), exact(seed=1)
    for p in pg_effect(lm, scope, NPO(beta=0.5), reference=reference, batches=2, batch_size=2).points:
        n, n0 = (float(losses(m, scope.forget, [p.passage])[0].detach().sum()) for m in (lm, reference))
        assert p.weight == pytest.approx(2 / (1 + math.exp(0.5 * (n - n0))), rel=1e-9)
    assert all(p.weight == pytest.approx(1) for p in pg_effect(lm, scope, batches=2, batch_size=2).points)


def test_an_objective_that_is_not_made_of_token_losses_weighs_all_passages_alike(questions):
    assert {p.weight for p in pg_effect(exact(), questions, IDK(), batches=1, batch_size=3).points} == {1.0}


def test_a_risk_may_be_written_for_either_side(scope):
    usual, turned = (g_effect(exact(), scope, NPO(), risk=risk, batches=2).at() for risk in (RetainNLL(), GA()))
    assert turned[4:6] == pytest.approx([-x for x in usual[4:6]], rel=1e-9)


def test_the_standard_error_is_how_much_the_effect_varies_or_a_little_more(lm):
    many = Scope.of("many", forget=texts(300, 5), retain=texts(300, 6), out_far=[])
    found = [g_effect(lm, many, GA(), batches=4, batch_size=4, seed=seed).at() for seed in range(12)]
    for value, error in (("unlearning", "unlearning_error"), ("retaining", "retaining_error")):
        spread = torch.tensor([getattr(r, value) for r in found]).std()
        said = torch.tensor([getattr(r, error) for r in found]).square().mean().sqrt()
        assert 0.7 < said / spread < 2  # here noise outweighs the gradients, so up to sqrt(2) is right


def test_of_the_same_passages_the_effect_is_too_large_by_the_variance_of_the_gradient(lm):
    many = Scope.of("many", forget=texts(60, 5), retain=texts(60, 6), out_far=[])

    def mean(same):
        settings = {"same_batches": same, "batches": 1, "batch_size": 6, "errors": False}
        return np.mean([g_effect(lm, many, GA(), seed=seed, **settings).at().unlearning for seed in range(12)])

    right = g_effect(lm, many, GA(), same_batches=True, batches=1, batch_size=60, errors=False).at().unlearning
    assert mean(same=True) < 1.5 * right
    assert abs(mean(same=False) - right) < 0.5 * abs(mean(same=True) - right)


def test_as_the_authors_do_gradients_of_the_same_batches_are_smoothed(scope):
    lm, beta = exact(), 0.5
    found = g_effect(lm, scope, NPO(beta=beta), compat="paper", reference=exact(seed=1), batches=4, batch_size=3)
    parameters, smooth, reference = list(lm.model.parameters()), {}, exact(seed=1)
    passages = found.settings["passages"]["risk"]
    assert found.settings["passages"]["objectives"]["forget"] == passages["forget"]
    for start in range(0, 12, 3):
        forget, retain = (passages[side][start : start + 3] for side in ("forget", "retain"))
        c0 = [c.detach() for c in losses(reference, scope.forget, forget)]
        values = {
            "unlearn": mean_nll(lm, scope.forget, forget),
            "retain": mean_nll(lm, scope.retain, retain),
            "objective": by_hand(NPO(beta=beta), losses(lm, scope.forget, forget), c0),
        }
        for name, value in values.items():
            g = gradient(value, parameters)
            smooth[name] = [0.6 * o + 0.4 * n for o, n in zip(smooth[name], g, strict=True)] if name in smooth else g
    expected = [dot(smooth[name], smooth["objective"]) for name in ("unlearn", "retain")]
    assert found.at()[4:6] == pytest.approx(expected, rel=1e-8)
    assert found.at().unlearning_error is None


def test_half_precision_weights_are_measured_in_full(scope):
    half = LM(make_hf().bfloat16(), make_tokenizer())
    full = LM(copy.deepcopy(half.model).float(), make_tokenizer())
    one, other = (g_effect(m, scope, [GA(), TNPO()], batches=2).rows for m in (half, full))
    assert [r[4:6] for r in one] == [pytest.approx(r[4:6], rel=1e-4, abs=1e-5) for r in other]
    assert half.dtype == torch.bfloat16


# What it leaves behind.


def state(lm):
    parameters = dict(lm.model.named_parameters())
    return {
        "weights": {n: (p.data_ptr(), p.detach().clone()) for n, p in parameters.items()},
        "gradients": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in parameters.items()},
        "flags": {n: p.requires_grad for n, p in parameters.items()},
        "modes": {n: m.training for n, m in lm.model.named_modules()},
        "hooks": n_hooks(lm.model),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "enabled": torch.is_grad_enabled(),
    }


def assert_same_state(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def lived_in(lm):
    """A model in use: some of it training, some frozen, some with gradients."""
    lm.model.train()
    lm.model.model.layers[1].eval()
    for i, p in enumerate(lm.model.parameters()):
        p.requires_grad_(i % 3 != 0)
        if i % 2 and p.requires_grad:
            p.grad = torch.ones_like(p)
    return lm


CALLS = {
    "g_effect": lambda lm, scope: g_effect(lm, scope, [GA(), NPO()], batches=2),
    "pg_effect": lambda lm, scope: pg_effect(lm, scope, GA(), batches=1),
    "trace": lambda lm, scope: trace_g_effect(lm, scope, Finetune(objectives=(GA(),), max_steps=2), every=1, batches=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
def test_nothing_is_left_of_it_even_when_it_fails(lived_in, scope, monkeypatch, call, fails):
    before, calls, evaluate = state(lived_in), [], GA.__call__

    def fail(self, step):
        calls.append(step)
        if fails and len(calls) > 1:
            raise RuntimeError("in the middle")
        return evaluate(self, step)

    monkeypatch.setattr(GA, "__call__", fail)
    with torch.no_grad():
        before["enabled"] = False
        if fails:
            with pytest.raises(RuntimeError, match="in the middle"):
                call(lived_in, scope)
        else:
            call(lived_in, scope)
        assert_same_state(state(lived_in), before)


def test_measuring_is_the_same_every_time_and_in_any_mode(lived_in, scope):
    first = g_effect(lived_in, scope, GA(), batches=2)
    lived_in.model.eval()
    torch.manual_seed(7)
    assert g_effect(lived_in, scope, GA(), batches=2).rows == first.rows
    assert g_effect(lived_in, scope, GA(), batches=2, seed=1).rows != first.rows


# Along a run.

METHOD = Finetune(objectives=(TNPO(), RetainKL()), max_steps=4, batch_size=4, lr=1e-3)


def test_a_run_begins_where_the_untouched_model_is(scope):
    lm = exact()
    run = trace_g_effect(lm, scope, METHOD, objectives=[GA(), TNPO()], every=2, batches=2, errors=True)
    once = g_effect(lm, scope, [GA(), TNPO()], batches=2)
    assert list(dict.fromkeys(r.step for r in run.rows)) == [0, 2, 4]
    assert [r[4:] for r in run.rows if r.step == 0] == [pytest.approx(r[4:], rel=1e-9) for r in once.rows]
    sums_up(run)


def test_a_run_ends_where_its_patch_is_with_the_untouched_model_for_a_reference(scope):
    lm = exact()
    untouched = LM(copy.deepcopy(lm.model), lm.tokenizer)
    asked = [NPO(), TNPO(), RetainKL(), UNDIAL()]
    run = trace_g_effect(lm, scope, METHOD, objectives=asked, every=4, batches=2)
    with METHOD.fit(Study(lm, scope)).on(lm):
        there = g_effect(lm, scope, asked, reference=untouched, batches=2, errors=False)
    last = [r for r in run.rows if r.step == 4]
    assert [r.objective for r in last] == [r.objective for r in there.rows]
    assert [r[4:6] for r in last] == [pytest.approx(r[4:6], rel=1e-4, abs=1e-6) for r in there.rows]
    assert run.at("retain_kl", step=0).retaining == pytest.approx(0, abs=1e-12)
    assert abs(run.at("retain_kl", step=4).retaining) > 1e-6


@pytest.mark.parametrize(
    "special",
    [{"adapter": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}}, {"gradient_checkpointing": True}],
    ids=["adapter", "checkpointing"],
)
def test_a_run_may_train_an_adapter_or_save_memory(scope, special):
    lm = exact()
    method = METHOD.model_copy(update=special)
    run = trace_g_effect(lm, scope, method, objectives=[GA(), RetainKL(), UNDIAL()], every=4, batches=2)
    assert run.at("retain_kl", step=0).retaining == pytest.approx(0, abs=1e-12)
    assert run.at("retain_kl", step=4).retaining != 0
    if "adapter" in special:
        assert run.at("ga", "embed").unlearning == run.at("ga", "head").unlearning == 0
    else:
        assert (
            run.rows
            == trace_g_effect(lm, scope, METHOD, objectives=[GA(), RetainKL(), UNDIAL()], every=4, batches=2).rows
        )


def test_the_direction_of_an_update_is_what_the_optimiser_did(scope):
    lm, weights, rates = exact(), [], []
    run = trace_g_effect(lm, scope, METHOD, direction="update", every=2, same_batches=True, batches=12, batch_size=2)
    METHOD.fit(
        Study(lm, scope),
        log=lambda _, values: rates.append(values["lr"]),
        probe=lambda _: weights.append([p.detach().clone() for p in lm.model.parameters()]),
    )
    assert [(r.step, r.objective) for r in run.rows if r.level == "total"] == [(0, "update"), (2, "update")]
    for step in (0, 2):
        with torch.no_grad():
            for p, w in zip(lm.model.parameters(), weights[step], strict=True):
                p.copy_(w)
        went = [(a - b) / rates[step] for a, b in zip(weights[step], weights[step + 1], strict=True)]
        for side, effect in (("forget", "unlearning"), ("retain", "retaining")):
            passages = getattr(scope, side)
            g = gradient(mean_nll(lm, passages, range(len(passages))), list(lm.model.parameters()))
            assert getattr(run.at(step=step), effect) == pytest.approx(dot(g, went), rel=1e-8)


# What is asked for wrongly.


def test_what_cannot_be_measured_is_said(scope):
    lm = exact()
    single = Scope.of("single", forget=[words(8, 9, 10)], retain=scope.retain, out_far=[])
    with pytest.raises(EmptyData, match="same_batches=True"):
        g_effect(lm, single, GA())
    assert g_effect(lm, single, GA(), same_batches=True).at().unlearning < 0
    with pytest.raises(InvalidConfig, match="given twice: ga, ga"):
        g_effect(lm, scope, [GA(), GA()])
    with pytest.raises(InvalidConfig, match="batches"):
        g_effect(lm, scope, GA(), batches=0)
    with pytest.raises(InvalidConfig, match="only one of them has 'alternate'"):
        g_effect(lm, scope, GA(), risk=DPO(preferred="alternate"))
    with pytest.raises(InvalidConfig, match="retain_nll reads what is to be retained"):
        pg_effect(lm, scope, RetainNLL())
    with pytest.raises(InvalidConfig, match="every is at least 1"):
        trace_g_effect(lm, scope, METHOD, every=0)
    with pytest.raises(InvalidConfig, match="padding"):
        trace_g_effect(lm, scope, METHOD, objectives=[RetainKL(compat="open-unlearning")])
    with pytest.raises(UnknownName, match="known: deep of ga at 0"):
        g_effect(lm, scope, GA(), batches=1).at("npo")


def test_results_are_plain_data(scope):
    found = g_effect(exact(), scope, GA(), batches=2)
    read = json.loads(found.to_json())
    assert [tuple(row.values()) for row in read["rows"]] == list(found.rows)
    assert read["settings"]["risk"] == {"kind": "retain_nll", "weight": 1.0}
    points = json.loads(pg_effect(exact(), scope, batches=1).to_json())["points"]
    assert points[0].keys() == {"passage", "unlearning", "retaining", "weight"}
