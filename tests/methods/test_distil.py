"""Distil: weights that say what the model under a patch says, measured where they were not trained."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from conftest import make_tokenizer

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.lm.head import Head
from concept_unlearn.methods import Distil, Finetune, Method, Study, Suppress
from concept_unlearn.methods.distil import _halves
from concept_unlearn.objectives import Follow, RetainKL
from concept_unlearn.patches import Stack, WeightPatch
from concept_unlearn.step import LiveReference, Step
from concept_unlearn.training.difference import difference
from concept_unlearn.weights import Dense


def suppress(planted):
    return Suppress(dictionaries=(planted.first,), n=2, edit={"kind": "clamp", "to": -4.0})


def distil(planted, **changes):
    settings = {"teacher": suppress(planted), "lr": 5e-3, "max_steps": 40, "batch_size": 8, "warm_up": 0.0}
    return Distil(**settings | changes)


@pytest.fixture(scope="module")
def fitted(planted):
    before, said = checksum(planted.lm.model), []
    teacher = suppress(planted)(planted.lm, planted.scope)
    student = distil(planted).fit(Study(planted.lm, planted.scope), log=lambda _, values: said.append(values))
    assert checksum(planted.lm.model) == before
    return teacher, student, said


def test_the_weights_say_what_the_patch_said_of_text_they_never_saw(planted, fitted):
    teacher, student, said = fitted
    assert isinstance(student, WeightPatch)
    _, held = _halves(planted.scope, 0.1, 0)
    for side, passages in (("forget", held.forget), ("retain", (*held.near, *held.retain))):
        found = difference(planted.lm, teacher, student, passages)
        assert said[-1][f"{side}_kl"] == pytest.approx(found.kl)
        assert said[-1][f"{side}_same"] == found.same
    assert said[-1]["forget_kl"] < 0.5 * said[-1]["forget_untouched_kl"]
    assert said[-1]["retain_kl"] < 0.1 * said[-1]["forget_untouched_kl"]


def test_it_begins_at_the_distance_of_the_untouched_model_and_ends_nearer(fitted):
    *_, said = fitted
    steps = [values for values in said if "follow" in values]
    assert steps[0]["follow"] > 0.1
    assert steps[0]["retain_kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["follow"] < 0.5 * steps[0]["follow"]


def test_it_is_baked_into_a_checkpoint_without_hook_or_gate(planted, fitted, ids, tmp_path):
    _, student, _ = fitted
    with torch.no_grad(), student.on(planted.lm):
        want = planted.lm.logits(ids)
    student.bake(planted.lm, tmp_path / "baked")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        torch.testing.assert_close(LM(model, make_tokenizer()).logits(ids), want)


def test_a_teacher_of_weights_is_followed_as_well_by_an_adapter(planted):
    teacher = Finetune(objectives=("ga",), lr=1e-2, max_steps=6, batch_size=8, parameters=("*.1.mlp.*",))
    said = []
    adapter = {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    method = distil(planted, teacher=teacher, adapter=adapter, lr=1e-2)
    method.fit(Study(planted.lm, planted.scope), log=lambda _, values: said.append(values))
    assert said[-1]["forget_kl"] < 0.5 * said[-1]["forget_untouched_kl"]


@pytest.mark.parametrize("kind", ["feature", "weight"])
def test_the_reference_is_the_model_under_the_patch_and_not_the_student(planted, kind):
    lm, split = planted.lm, "forget"
    if kind == "feature":
        teacher = suppress(planted)(lm, planted.scope)
    else:
        noise = torch.randn(lm.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        teacher = WeightPatch({"lm_head.weight": Dense(noise)})
    from concept_unlearn.training.data import make_data
    from concept_unlearn.training.settings import Optimisation
    from concept_unlearn.training.trainable import train_weights

    batch = make_data(lm, planted.scope, [split], Optimisation()).splits[split].batch([0, 1, 2])
    with torch.no_grad(), teacher.on(lm):
        want = lm.logits(batch.ids)[batch.positions()]
    with train_weights(lm, None) as student:
        head = Head(lm.model)
        live = student.reference(head).within(lambda: teacher.on(lm))
        assert isinstance(live, LiveReference)
        with torch.no_grad():
            for p in student.parameters.values():
                p.add_(0.1)
            torch.testing.assert_close(live.logits(live.hidden(split, batch, "answer")), want, rtol=1e-4, atol=1e-4)
        loss = Follow()(step := Step(lm, {split: batch}, Follow().reads(lm), head=head, reference=live))
        loss.backward()
        assert loss > 0
        assert step.lm is lm
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters.values())


def test_a_patch_that_does_nothing_leaves_nothing_to_learn(planted):
    teacher = Suppress(dictionaries=(planted.first,), n=2, edit={"kind": "scale", "by": 1.0})
    method, said = distil(planted, teacher=teacher, max_steps=2, lr=1e-6), []
    method.fit(Study(planted.lm, planted.scope), log=lambda _, values: said.append(values))
    assert said[-1]["forget_kl"] < 1e-6
    assert said[-1]["forget_same"] == 1.0


def test_too_little_training_is_warned_of(planted):
    with pytest.warns(UserWarning, match="on held-out text to forget the student is .* nats a token from its teacher"):
        distil(planted, max_steps=1, lr=1e-6)(planted.lm, planted.scope)


def test_what_is_held_out_is_not_trained_on_and_with_none_all_is(planted):
    kept, held = _halves(planted.scope, 0.25, 0)
    for name in ("forget", "near", "retain"):
        a, b = set(getattr(kept, name)), set(getattr(held, name))
        assert not a & b
        assert a | b == set(getattr(planted.scope, name))
        assert len(b) == round(0.25 * len(getattr(planted.scope, name)))
    assert _halves(planted.scope, 0.0, 0) == (planted.scope, planted.scope)


def test_a_patch_of_the_logits_is_refused(planted):
    class Nothing:
        """As a logit offset says of itself."""

        access = "logits"

    teacher = suppress(planted)

    class Made(Method):
        def fit(self, study):
            return Stack((teacher.fit(study), Nothing()))

    try:
        with pytest.raises(InvalidConfig, match="a stack patch changes the logits that come out of it"):
            distil(planted, teacher=Made())(planted.lm, planted.scope)
    finally:
        del Method.members["made"]


def test_stopped_it_goes_on_to_the_same_bytes_and_another_teacher_is_refused(planted, tmp_path):
    settings = {"max_steps": 6, "checkpoint_every": 2}

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with warnings.catch_warnings(action="ignore"):
        whole = distil(planted, **settings)(planted.lm, planted.scope, folder=tmp_path / "whole")
        folder = tmp_path / "stopped"
        with pytest.raises(KeyboardInterrupt):
            distil(planted, **settings).fit(Study(planted.lm, planted.scope, folder=folder), probe=stop)
        assert distil(planted, **settings)(planted.lm, planted.scope, folder=folder).digest == whole.digest
    other = suppress(planted).model_copy(update={"n": 1})
    with pytest.raises(InvalidConfig):
        distil(planted, teacher=other, **settings)(planted.lm, planted.scope, folder=folder)


def test_it_reads_what_its_teacher_reads_and_is_its_spec(planted):
    method = distil(planted)
    assert method.reads == ((planted.first,), ())
    assert [o.kind for o in method.objectives] == [Follow(where="content").kind, RetainKL().kind]
    assert Method.parse(method.spec()) == method
    assert Site("resid_pre", 0) == Study(planted.lm, planted.scope).dictionary(planted.first).site
