"""Training through the ensemble: what is said goes down the objectives, and only the small model's copy moves."""

from __future__ import annotations

import copy
import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_hf, make_tokenizer, n_hooks
from workers import tiny_scope

from concept_unlearn.errors import InvalidConfig, PatchMismatch
from concept_unlearn.lm import LM
from concept_unlearn.lm.ensemble import offset
from concept_unlearn.lm.head import ending
from concept_unlearn.lm.remote import RemoteLogits
from concept_unlearn.methods import Finetune, Method, Offset, Study
from concept_unlearn.objectives import GA, IDK, NPO, RMU, RetainKL, RetainNLL
from concept_unlearn.patches import WeightPatch, load_patch
from concept_unlearn.step import LiveReference, Read, Step
from concept_unlearn.training import Watch
from concept_unlearn.training.data import make_data
from concept_unlearn.training.ensemble import Pair
from concept_unlearn.training.trainable import train_weights

READS = [Read("forget"), Read("retain")]


@pytest.fixture
def scope():
    return tiny_scope()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_hf("gpt2", seed=5).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def method(small_folder):
    def make(**settings):
        quick = {"small": small_folder, "lr": 1e-2, "batch_size": 4, "epochs": 2, "warm_up": 0}
        return Offset(**quick | settings)

    return make


def fit(method, lm, scope, *, folder=None, probe=None):
    seen = []
    patch = method.fit(Study(lm, scope, folder=folder), log=lambda _, values: seen.append(values), probe=probe)
    return patch, [values for values in seen if "loss" in values]


def state(lm):
    return {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in lm.model.named_parameters()}


def assert_same(lm, before):
    for name, p in lm.model.named_parameters():
        assert (p.data_ptr(), p.requires_grad) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert n_hooks(lm.model) == 0


def batches(lm, scope, splits=("forget", "retain")):
    data = make_data(lm, scope, splits, Offset(small=""))
    return {split: data.splits[split].batch(data.items[split][:4]) for split in splits}


class TestTheEnsemble:
    @pytest.fixture
    def small(self):
        return LM(make_hf("gpt2", seed=5), make_tokenizer(), name="small")

    def test_before_training_it_says_exactly_what_the_big_model_says(self, lm, small, scope):
        given = batches(lm, scope)
        with train_weights(small, None) as inner:
            pair = Pair(lm, ending(lm.model), inner, alpha=1.0, n=VOCAB)
            head = pair.head()
            own = ending(lm.model)
            for batch in given.values():
                mine, big = head.hidden(batch.ids, batch.mask), own.hidden(batch.ids, batch.mask)
                rows = head(mine[batch.mask])
                assert torch.equal(rows, own(mine[batch.mask][:, : lm.d_model]))
                torch.testing.assert_close(rows, own(big[batch.mask]))
                assert rows.requires_grad

    def test_its_gradient_is_alpha_times_that_of_its_logits_and_reaches_the_copy_alone(self, lm, small, scope):
        """dL/dl_o' = alpha dL/dl_e, through three whole models and by hand."""
        batch, alpha = batches(lm, scope)["forget"], 0.6
        copied = copy.deepcopy(small.model)
        step_sizes = {n: 0.01 * torch.randn_like(p) for n, p in small.model.named_parameters()}
        with torch.no_grad():
            for name, p in copied.named_parameters():
                p.add_(step_sizes[name])
        arguments = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        with torch.no_grad():
            big, base = lm.model(**arguments).logits, small.model(**arguments).logits
        said = offset(big, copied(**arguments).logits, base, alpha=alpha, n=VOCAB)
        positions = batch.positions()
        labels = batch.ids.roll(-1, 1)[positions]
        torch.nn.functional.cross_entropy(said[positions], labels).backward()
        before = state(lm)
        with train_weights(small, None) as inner:
            pair = Pair(lm, ending(lm.model), inner, alpha=alpha, n=VOCAB)
            with torch.no_grad():
                for name, p in inner.parameters.items():
                    p.add_(step_sizes[name])
            step = Step(
                lm, {"forget": batch}, READS[:1], head=pair.head(), reference=LiveReference(lm, ending(lm.model))
            )
            step.token_mean("forget", step.nll("forget")).backward()
            for name, p in inner.parameters.items():
                torch.testing.assert_close(p.grad, copied.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
                assert p.grad.any() or "position" in name or p.grad.numel() <= 16 * 3, name
        assert_same(lm, before)

    def test_each_row_is_asked_of_the_big_model_once(self, lm, small, scope):
        batch, asked = batches(lm, scope)["retain"], []
        with train_weights(small, None) as inner:
            head = Pair(lm, ending(lm.model), inner, alpha=1.0, n=VOCAB).head()
            handle = lm.model.register_forward_pre_hook(lambda *_: asked.append(1))
            first = head.hidden(batch.ids, batch.mask)
            again = head.hidden(batch.ids[:2], batch.mask[:2])
            handle.remove()
        assert len(asked) == len(batch.ids)
        d = lm.d_model
        assert torch.equal(first[:2, :, :d], again[..., :d])

    def test_its_reference_is_the_big_model(self, lm, small, scope):
        batch = batches(lm, scope)["retain"]
        with train_weights(small, None) as inner:
            pair = Pair(lm, ending(lm.model), inner, alpha=1.0, n=VOCAB)
            live = pair.reference(pair.head())
            torch.testing.assert_close(
                live.nll("retain", batch), LiveReference(lm, ending(lm.model)).nll("retain", batch)
            )


class TestTraining:
    def test_it_forgets_what_it_says_and_leaves_both_models(self, lm, scope, method, ids):
        before, base = state(lm), lm.logits(ids)
        study = Study(lm, scope)
        made = method()
        small = made._small(study)
        small_before = state(small)
        seen = []
        patch = made.fit(study, log=lambda _, values: seen.append(values))
        assert_same(lm, before)
        assert_same(small, small_before)
        assert seen[-1]["forget_nll"] > seen[0]["forget_nll"] + 0.5
        given = batches(lm, scope)
        with patch.on(lm):
            said = {s: _nll(lm, b) for s, b in given.items()}
        untouched = {s: _nll(lm, b) for s, b in given.items()}
        assert said["forget"] > untouched["forget"] + 0.5
        assert torch.equal(lm.logits(ids), base)

    def test_what_training_heard_is_what_the_patch_says(self, lm, scope, method):
        """The ensemble in training and the patch on the live model are one and the same."""
        made = method(max_steps=2, batch_size=10, micro_batch=10)
        more = made.model_copy(update={"max_steps": 1})
        patch = fit(more.model_copy(update={"schedule": "constant"}), lm, scope)[0]
        losses = fit(made.model_copy(update={"schedule": "constant"}), lm, scope)[1]
        data = make_data(lm, scope, ["forget"], made)
        batch = data.splits["forget"].batch(data.items["forget"])
        with patch.on(lm):
            assert losses[1]["forget_nll"] == pytest.approx(_nll(lm, batch), rel=1e-4)

    @pytest.mark.parametrize(
        "objectives", [(GA(),), (GA(), RetainNLL()), (GA(), RetainKL()), (IDK(), RetainNLL()), (NPO(), RetainKL())]
    )
    def test_every_objective_of_what_is_said_goes_down(self, lm, scope, method, objectives):
        losses = fit(method(objectives=objectives, schedule="constant", epochs=4), lm, scope)[1]
        assert losses[-1]["loss"] < losses[0]["loss"]

    def test_at_first_the_retained_divergence_is_none(self, lm, scope, method):
        losses = fit(method(max_steps=1), lm, scope)[1]
        assert abs(losses[0]["retain_kl"]) < 1e-6

    def test_with_an_adapter_the_small_model_is_its_own_base(self, lm, scope, method, small_folder):
        patch, losses = fit(
            method(adapter={"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}, lr=5e-2), lm, scope
        )
        assert {delta.kind for delta in patch.deltas.values()} == {"low_rank"}
        assert all("c_attn" in name for name in patch.deltas)
        assert losses[-1]["forget_nll"] > losses[0]["forget_nll"]

    def test_only_the_parameters_that_are_asked_for_are_trained(self, lm, scope, method):
        patch = fit(method(parameters=("transformer.h.1.*",), max_steps=2), lm, scope)[0]
        assert patch.deltas
        assert all(name.startswith("transformer.h.1.") for name in patch.deltas)

    def test_micro_batches_and_checkpointing_change_rounding_only(self, lm, scope, method):
        whole = fit(method(micro_batch=8, max_steps=3), lm, scope)[0]
        cut = fit(method(micro_batch=1, gradient_checkpointing=True, max_steps=3), lm, scope)[0]
        assert whole.deltas.keys() == cut.deltas.keys()
        change = torch.cat([d.dense().flatten() for d in whole.deltas.values()])
        other = torch.cat([d.dense().flatten() for d in cut.deltas.values()])
        assert (change - other).norm() < 0.02 * change.norm()

    def test_stopped_and_gone_on_it_ends_in_the_same_bytes(self, lm, scope, method, tmp_path):
        made = method(checkpoint_every=1)
        whole = fit(made, lm, scope)[0]

        def stop(step):
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(made, lm, scope, folder=tmp_path, probe=stop)
        resumed = fit(made, lm, scope, folder=tmp_path)[0]
        assert whole.deltas.keys() == resumed.deltas.keys()
        assert all(torch.equal(d.dense(), resumed.deltas[n].dense()) for n, d in whole.deltas.items())

    def test_a_checkpoint_beside_another_small_model_is_not_gone_on_from(self, lm, scope, method, tmp_path):
        other = tmp_path / "other"
        make_hf("gpt2", seed=6).save_pretrained(other)
        make_tokenizer().save_pretrained(other)
        made = method(small=str(other), max_steps=2)
        fit(made, lm, scope, folder=tmp_path / "work")
        make_hf("gpt2", seed=7).save_pretrained(other)
        with pytest.raises(InvalidConfig, match="small"):
            fit(made, lm, scope, folder=tmp_path / "work")

    def test_a_watch_measures_what_is_said(self, lm, scope, method):
        watched = []
        method(watch=Watch(every=1, keep=0.01), epochs=2).fit(
            Study(lm, scope), log=lambda _, values: watched.append(values.get("watched_forget"))
        )
        found = [w for w in watched if w is not None]
        assert found[-1] < found[0] or len(found) == 1

    def test_on_top_of_an_offset_it_begins_from_what_is_said(self, lm, scope, method):
        first = fit(method(max_steps=4), lm, scope)[0]
        with first.on(lm):
            losses = fit(method(max_steps=1, batch_size=10), lm, scope)[1]
            batch = make_data(lm, scope, ["forget"], method()).splits["forget"].batch(range(len(scope.forget)))
            assert losses[0]["forget_nll"] == pytest.approx(_nll(lm, batch), rel=1e-4)

    def test_whoever_trains_the_big_model_under_it_goes_down_what_is_said(self, lm, scope, method):
        """As an attacker does who relearns."""
        patch = fit(method(max_steps=4), lm, scope)[0]
        batch = make_data(lm, scope, ["retain"], method()).splits["retain"].batch(range(len(scope.retain)))
        seen = []
        lesson = Finetune(
            objectives=(RetainNLL(),), lr=1e-3, max_steps=3, batch_size=20, warm_up=0, retain_per_forget=2
        )
        with patch.on(lm):
            said = _nll(lm, batch)
            change = lesson.fit(Study(lm, scope), log=lambda _, values: seen.append(values["retain_nll"]))
        assert seen[0] == pytest.approx(said, rel=1e-4)
        with change.on(lm), patch.on(lm):
            assert _nll(lm, batch) < said


class TestOnDisk:
    def test_saved_and_loaded_it_does_the_same(self, lm, scope, method, ids, tmp_path):
        patch = fit(method(max_steps=2, store="bfloat16", alpha=0.5), lm, scope)[0]
        loaded = load_patch(patch.save(tmp_path, lm), lm)
        assert loaded.alpha == 0.5
        assert {d.change.dtype for d in loaded.deltas.values()} == {torch.bfloat16}
        with patch.on(lm):
            want = lm.logits(ids)
        with loaded.on(lm):
            assert torch.equal(lm.logits(ids), want)

    def test_a_method_is_its_spec(self, method):
        made = method(alpha=2.0, adapter={"r": 4})
        assert Method.parse(made.spec()) == made
        assert made.kind == "offset"
        default = Offset(small="somewhere")
        assert default.objectives == (GA(), RetainKL())
        assert (default.lr, default.epochs, default.batch_size, default.micro_batch) == (1e-5, 5, 16, 4)


class TestBlackBox:
    def test_a_model_behind_an_address_is_unlearned_as_if_it_were_here(self, lm, scope, method):
        path = Path(__file__).parents[2] / "scripts" / "serve_logits.py"
        spec = importlib.util.spec_from_file_location("serve_logits", path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        server = script.make_server(lm)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            far = LM(RemoteLogits(address, "tiny", vocabulary=VOCAB, end_id=1), make_tokenizer(), name="far")
            near_losses = fit(method(max_steps=3), lm, scope)[1]
            patch, losses = fit(method(max_steps=3), far, scope)
            for a, b in zip(losses, near_losses, strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-4)
            prompts = [[7, 8, 9], [10, 11]]
            with patch.on(far):
                said = far.generate_ids(prompts, max_new_tokens=5)
            with patch.on(lm):
                assert lm.generate_ids(prompts, max_new_tokens=5) == said
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class TestBadInput:
    def test_objectives_of_activations_are_refused(self, lm, scope, method):
        with pytest.raises(InvalidConfig, match=r"rmu reads activations \(blocks\.2\.hook_resid_post\)"):
            fit(method(objectives=(RMU(),)), lm, scope)

    def test_a_small_model_of_another_tokenizer_is_refused(self, lm, scope, method, tmp_path):
        make_hf("gpt2").save_pretrained(tmp_path)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["w99"])
        tokenizer.save_pretrained(tmp_path)
        before = state(lm)
        with pytest.raises(PatchMismatch, match="another tokenizer"):
            fit(method(small=str(tmp_path)), lm, scope)
        assert_same(lm, before)

    def test_an_adapter_and_parameters_exclude_each_other(self, lm, scope, method):
        with pytest.raises(InvalidConfig, match="target_modules"):
            fit(method(adapter={"r": 2}, parameters=("*",)), lm, scope)


def test_the_patch_of_weights_in_it_is_one_of_the_small_model(lm, scope, method, ids):
    """M = o, alpha 1: what is left is direct tuning."""
    made = method(max_steps=2)
    patch = fit(made, lm, scope)[0]
    twin = LM(make_hf("gpt2", seed=5), make_tokenizer(), name="twin")
    with patch.on(twin):
        said = twin.logits(ids)
    with WeightPatch(patch.deltas).on(twin):
        torch.testing.assert_close(said, twin.logits(ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _nll(lm, batch):
    positions = batch.positions()
    logits = lm.logits(batch.ids, batch.mask)[positions].float()
    return float(torch.nn.functional.cross_entropy(logits, batch.ids.roll(-1, 1)[positions]))
