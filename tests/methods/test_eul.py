"""Unlearning layers: a student that begins as its teacher, keeps to it on what is kept and departs on what is not."""

from __future__ import annotations

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, make_hf, make_tokenizer, n_hooks
from torch.nn.functional import cross_entropy, kl_div
from workers import tiny_finetune, tiny_scope

from concept_unlearn.errors import InvalidConfig, SiteNotFound
from concept_unlearn.gates import ProbeGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.methods import EUL, Method, Study
from concept_unlearn.methods.descent import make_data
from concept_unlearn.objectives import DPO, GA, Depart, RetainKL, RetainNLL
from concept_unlearn.patches import AdapterPatch, fuse, load_patch
from concept_unlearn.step import LiveReference, Step

FAST = {"lr": 1e-2, "epochs": 3, "batch_size": 4, "width": 3}


@pytest.fixture
def scope():
    return tiny_scope()


def fit(lm, scope, *, probe=None, folder=None, progress=None, **settings):
    seen = []
    study = Study(lm, scope, folder=folder, progress=progress)
    patch = EUL(**FAST | settings).fit(study, log=lambda _, values: seen.append(values), probe=probe)
    return patch, seen


def logits(lm, ids, patch=None):
    with torch.no_grad():
        if patch is None:
            return lm.logits(ids)
        with patch.on(lm):
            return lm.logits(ids)


def divergence(lm, scope, patch, split):
    """Of the patched model from the untouched one, on average over answer tokens."""
    rows = make_data(lm, scope, [split], EUL()).splits[split]
    batch = rows.batch(range(len(rows.rows)))
    use = batch.positions()
    with torch.no_grad():
        p0 = lm.logits(batch.ids, batch.mask)[use].log_softmax(-1)
        with patch.on(lm):
            p = lm.logits(batch.ids, batch.mask)[use].log_softmax(-1)
    return float(kl_div(p, p0, reduction="batchmean", log_target=True))


def nll(lm, scope, split):
    """Of the answers' tokens."""
    rows = make_data(lm, scope, [split], EUL()).splits[split]
    batch = rows.batch(range(len(rows.rows)))
    use = batch.positions()
    with torch.no_grad():
        return float(cross_entropy(lm.logits(batch.ids, batch.mask)[use], batch.ids.roll(-1, 1)[use]))


def test_it_departs_on_what_is_to_be_forgotten_and_follows_on_the_rest(lm, scope):
    lesson = tiny_finetune(objectives=(GA(weight=-1.0), RetainNLL()), lr=1e-2, epochs=40, retain_per_forget=2)
    with lesson(lm, scope).on(lm):  # a model that knows both
        before = {split: nll(lm, scope, split) for split in ("forget", "retain")}
        assert max(before.values()) < 0.2
        patch, _ = fit(lm, scope, epochs=20)
        with patch.on(lm):
            assert nll(lm, scope, "forget") > before["forget"] + 1
            assert nll(lm, scope, "retain") < before["retain"] + 0.2
        assert divergence(lm, scope, patch, "forget") > 5 * divergence(lm, scope, patch, "retain")


@pytest.mark.parametrize("adapter", ["bottleneck", "linear"])
def test_it_begins_as_its_teacher(lm, scope, ids, adapter):
    plain, at_start = logits(lm, ids), []

    def look(step):
        if step == 0:
            at_start.append(logits(lm, ids))

    fit(lm, scope, adapter=adapter, width=None, probe=look, max_steps=4)
    assert torch.equal(at_start[0], plain)


def test_a_retain_step_lowers_the_divergence_there_and_a_forget_step_raises_it(lm, scope):
    """From a student that is no longer its teacher, each term by itself."""
    start, _ = fit(lm, scope)
    data = make_data(lm, scope, ["forget", "retain"], EUL())
    with torch.inference_mode(False):
        for objective, split, sign in ((RetainKL(), "retain", -1), (Depart(), "forget", 1)):
            leaves = {name: t.clone().requires_grad_() for name, t in start.without_grams().tensors().items()}
            live = AdapterPatch.restore(start.without_grams().spec(), leaves, None)
            rows = data.splits[split]
            batch = rows.batch(range(len(rows.rows)))
            with torch.no_grad():
                reference = LiveReference(LM(lm.model, lm.tokenizer), Step(lm, {}, [])._head)
                cached = reference.hidden(split, batch, "answer")
            reference.hidden = lambda *_, cached=cached: cached
            with live.on(lm):
                step = Step(lm, {split: batch}, objective.reads(lm), reference=reference)
                grads = torch.autograd.grad(objective(step), list(leaves.values()))
            moved = {n: (t - 1e-2 * g).detach() for (n, t), g in zip(leaves.items(), grads, strict=True)}
            after = AdapterPatch.restore(live.spec(), moved, None)
            change = divergence(lm, scope, after, split) - divergence(lm, scope, start, split)
            assert change * sign > 0


def test_the_model_is_what_it_was_to_the_last_bit_flag_and_hook(lm, scope, ids):
    before, flags = [p.clone() for p in lm.model.parameters()], [p.requires_grad for p in lm.model.parameters()]
    patch, _ = fit(lm, scope)
    logits(lm, ids, patch)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())
    assert n_hooks(lm.model) == 0


def test_only_adapters_get_gradients(lm, scope):
    def look(step):
        assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())

    fit(lm, scope, probe=look)


@pytest.mark.parametrize("adapter", ["bottleneck", "linear"])
def test_the_patch_is_the_trained_student(lm, scope, ids, adapter, tmp_path):
    live = []
    patch, losses = fit(lm, scope, adapter=adapter, width=None, probe=lambda _: live.append(logits(lm, ids)))
    assert len(losses) + 1 == len(live)
    torch.testing.assert_close(logits(lm, ids, patch), live[-1])
    assert not torch.allclose(live[-1], live[0], atol=0.1)
    again = load_patch(patch.save(tmp_path, lm), lm)
    assert torch.equal(logits(lm, ids, again), logits(lm, ids, patch))


@pytest.mark.parametrize("layers", [None, (1,), (2, 0)])
def test_adapters_stand_after_the_feed_forward_networks_of_the_blocks_asked_for(lm, scope, layers):
    patch, _ = fit(lm, scope, layers=layers, max_steps=4)
    assert list(patch.adapters) == [Site("mlp_out", i) for i in sorted(layers or range(N_LAYERS))]
    assert all(a.kind == "bottleneck" and a.d == D_MODEL for a in patch.adapters.values())


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_a_share_of_the_parameters_is_what_adapters_take(lm, scope, share):
    n = sum(p.numel() for p in lm.model.parameters())
    patch, _ = fit(lm, scope, width=None, share=share, max_steps=4)
    one_wider = N_LAYERS * (2 * D_MODEL + 1)
    assert patch.n_parameters <= share * n < patch.n_parameters + one_wider


def test_a_seed_is_one_result_and_another_seed_another(lm, scope):
    one, same, other = (fit(lm, scope, seed=seed, max_steps=8)[0] for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def test_what_was_stopped_goes_on_to_the_same_bytes(lm, scope, tmp_path):
    def stop(step):
        if step == 11:
            raise KeyboardInterrupt

    whole, _ = fit(lm, scope, folder=tmp_path / "whole", checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        fit(lm, scope, folder=tmp_path / "stopped", probe=stop, checkpoint_every=4)
    again, losses = fit(lm, scope, folder=tmp_path / "stopped", checkpoint_every=4)
    assert len(losses) == 10
    assert again.digest == whole.digest
    assert (tmp_path / "stopped/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_progress_adds_up(lm, scope):
    told = []
    fit(lm, scope, progress=told.append)
    assert sum(told) == EUL(**FAST).n_items(scope)


def test_gram_matrices_are_of_the_tokens_to_forget_that_predict_something(lm, scope):
    patch, _ = fit(lm, scope, max_steps=4)
    rows = make_data(lm, scope, ["forget"], EUL()).splits["forget"].rows
    n = sum(i != lm.bos_id for row in rows for i in row.ids[:-1])
    assert {float(g[-1, -1]) for own in patch.grams.values() for g in own.values()} == {n}
    assert fit(lm, scope, max_steps=4, grams=False)[0].grams is None


def test_successive_requests_are_fused_into_one_patch_that_forgets_both(lm):
    requests = [tiny_scope(5), tiny_scope(9)]
    patches = [fit(lm, r, epochs=8, adapter="linear", width=None)[0] for r in requests]
    fused = fuse(patches)
    for request, own in zip(requests, patches, strict=True):
        far = divergence(lm, request, own, "forget")
        assert divergence(lm, request, fused, "forget") > far / 4


def test_a_probe_gate_leaves_other_prompts_alone(planted):
    patch = EUL(**FAST | {"gate": "probe", "layers": (1, 2), "max_steps": 8})(planted.lm, planted.scope)
    assert isinstance(patch.gate, ProbeGate)
    assert patch.sensor.site == Site("resid_pre", 1)
    ids = [
        torch.tensor([planted.lm.encode(p.text, chat=False)])
        for p in (planted.scope.forget[0], planted.scope.retain[0])
    ]
    changed = [not torch.equal(logits(planted.lm, i, patch), logits(planted.lm, i)) for i in ids]
    assert changed == [True, False]


def test_every_library_of_models_has_a_place_for_it(any_lm, scope, ids):
    patch, losses = fit(any_lm, scope, max_steps=6)
    assert losses[5]["depart"] < losses[3]["depart"]
    assert not torch.equal(logits(any_lm, ids, patch), logits(any_lm, ids))


def test_a_model_in_half_precision_gets_adapters_in_full(scope):
    lm = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="half")
    patch, _ = fit(lm, scope, max_steps=4)
    assert {t.dtype for a in patch.adapters.values() for t in a.tensors().values()} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_recomputed_blocks_change_nothing(lm, scope):
    one, other = (fit(lm, scope, gradient_checkpointing=on, micro_batch=2, max_steps=6)[0] for on in (False, True))
    for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class TestBadInput:
    def test_a_block_that_is_not_there(self, lm, scope):
        for layers in ((3,), (-1,)):
            with pytest.raises(SiteNotFound, match="layers 0 to 2"):
                EUL(layers=layers)(lm, scope)

    def test_a_model_without_a_feed_forward_network_there(self, lm, scope):
        del lm.model.model.layers[1].mlp
        with pytest.raises(SiteNotFound, match=r"no place for blocks\.1\.hook_mlp_out"):
            EUL(layers=(1,))(lm, scope)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"adapter": "linear", "width": 4}, "leave width out"),
            ({"gate": "sequence"}, "no features for a sequence gate to count"),
            ({"layers": ()}, "at least 1 item"),
            ({"width": 0}, "greater than 0"),
            ({"share": 0.0}, "greater than 0"),
        ],
        ids=str,
    )
    def test_settings_that_do_not_go_together(self, settings, says):
        with pytest.raises(InvalidConfig, match=says):
            Method.parse({"kind": "eul"} | settings)

    def test_objectives_of_one_side_cannot_alternate(self, lm, scope):
        with pytest.raises(InvalidConfig, match="to alternate takes"):
            fit(lm, scope, objectives=(GA(),))
        fit(lm, scope, objectives=(GA(),), alternate=False, max_steps=1)

    def test_a_run_that_ends_before_anything_is_forgotten(self, lm, scope):
        with pytest.raises(InvalidConfig, match="the first 3 steps are on what is kept, and there are 3"):
            fit(lm, scope, max_steps=3)

    def test_recomputed_blocks_do_not_go_with_an_objective_of_two_splits(self, lm, scope):
        with pytest.raises(InvalidConfig, match="reads two splits"):
            fit(lm, scope, objectives=(DPO(), RetainKL()), gradient_checkpointing=True)


def test_a_method_is_its_spec():
    method = EUL(layers=(7, 8), adapter="linear", gate="probe")
    assert Method.parse(method.spec()) == method
    assert [(o.kind, o.weight) for o in EUL().objectives] == [
        ("retain_kl", 0.8), ("depart", 1.0), ("retain_nll", 1.0), ("ga", 0.2),
    ]  # fmt: skip
