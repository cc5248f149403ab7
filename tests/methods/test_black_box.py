"""A model that only answers unlearns: within its budget, without a gradient, and nobody else notices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONCEPT, FAR, NEAR, words

from concept_unlearn.data.examples import Probe
from concept_unlearn.data.scope import Scope
from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.gates import Always, ProbeGate, SequenceGate
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.methods import BlackBox, Method, Study
from concept_unlearn.methods.black_box import _Asking
from concept_unlearn.methods.questions import fitted_gate, flagged, forget_questions
from concept_unlearn.methods.refusing import Refusing
from concept_unlearn.patches import PromptPatch, load_patch
from concept_unlearn.patches.prompt_edits import Vectors
from concept_unlearn.zeroth import n_queries

QUICK = {"budget": 400, "q": 4, "k": 2, "lr": 0.3, "beta": 0.1}


@pytest.fixture(autouse=True)
def refusals(monkeypatch):
    """Two tokens that no answer begins with."""
    for module in ("refusing", "black_box"):
        monkeypatch.setattr(f"concept_unlearn.methods.{module}.refusal_texts", lambda: ["w46 w9", "w47 w9"])


@pytest.fixture(scope="module")
def scope(planted):
    """Questions in the concept's own words, answered by what the model says, unless that is a refusal here."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, pool in {"in_easy": CONCEPT, "out_near": NEAR, "out_far": FAR}.items():
        drawn = [torch.randperm(len(pool), generator=generator)[:5].tolist() for _ in range(16)]
        prompts = list(dict.fromkeys(words(*(pool[i] for i in row)) for row in drawn))
        said = planted.lm.generate(prompts, max_new_tokens=1, chat=False)
        known = [(p, a) for p, a in zip(prompts, said, strict=True) if a.startswith("w") and a not in ("w46", "w47")]
        found[name] = tuple(Probe(prompt=p, answers=(a,), distractors=("w46", "w47")) for p, a in known)
    return replace(planted.scope, in_hard=(), **found)


def loss_of(method, study, patch):
    """On all prompts to forget."""
    asking = _Asking(method.model_copy(update={"batch_size": 100, "budget": 10**6}), study)
    return float(asking.loss((patch.edit.vectors / asking.scale)[None], 0))


@pytest.mark.parametrize("k", [2, "all"])
def test_it_learns_to_refuse(planted, scope, k):
    study = Study(planted.lm, scope)
    method = BlackBox(**QUICK | {"k": k, "budget": 1000, "batch_size": 3})
    patch = method.fit(study)
    untouched = replace(patch, edit=replace(patch.edit, vectors=torch.zeros_like(patch.edit.vectors)))
    assert loss_of(method, study, patch) < 0.7 * loss_of(method, study, untouched)
    assert patch.edit.where == ("all" if k == "all" else "first")
    assert len(patch.edit.vectors) == (1 if k == "all" else 2)


def test_prompts_that_are_not_of_the_concept_are_bit_identical(planted, scope):
    patch = BlackBox(**QUICK)(planted.lm, scope)
    for pool, meant in ((CONCEPT, True), (NEAR, False), (FAR, False)):
        row = torch.tensor([planted.lm.encode(words(*pool[:6]), chat=False)])
        base = planted.lm.logits(row)
        with patch.on(planted.lm):
            assert torch.equal(planted.lm.logits(row), base) != meant


@pytest.mark.parametrize(("sides", "batch"), [(1, 3), (2, 2)])
def test_no_more_is_asked_than_the_budget_and_the_client_counts(planted, scope, sides, batch):
    passes, asked = [], []
    handle = planted.lm.model.lm_head.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    patch = BlackBox(**QUICK | {"sides": sides, "batch_size": batch, "budget": 200})(planted.lm, scope)
    handle.remove()
    one = n_queries(batch, 4, sides)
    assert patch.queries == sum(passes) == 200 // one * one
    study = Study(planted.lm, scope, progress=asked.append)
    assert BlackBox(**QUICK | {"mapping": "frequency", "m": 1}).fit(study).queries <= 400


def test_the_model_is_never_differentiated_nor_changed(planted, scope, monkeypatch):
    before = checksum(planted.lm.model)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    gate = SequenceGate(alpha=0.05)  # a probe gate is itself fitted by gradients, of the probe
    BlackBox(**QUICK | {"gate": gate})(planted.lm, scope)
    assert checksum(planted.lm.model) == before
    assert all(p.grad is None and p.requires_grad for p in planted.lm.model.parameters())


def test_a_seed_decides(planted, scope):
    study = Study(planted.lm, scope)
    one, same, other = (BlackBox(**QUICK, seed=seed).fit(study) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def test_it_goes_on_from_its_checkpoint_to_the_same_bytes(planted, scope, tmp_path, monkeypatch):
    method = BlackBox(**QUICK | {"gate": "always"})
    whole = method(planted.lm, scope)
    monkeypatch.setattr("concept_unlearn.methods.black_box._EVERY", 2)
    real, calls = _Asking.loss, []

    def failing(self, points, step):
        calls.append(step)
        if step == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return real(self, points, step)

    monkeypatch.setattr(_Asking, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method(planted.lm, scope, folder=tmp_path)
    resumed = method(planted.lm, scope, folder=tmp_path)
    assert calls[:6] == [0, 1, 2, 3, 2, 3]
    assert resumed.digest == whole.digest
    assert method(planted.lm, scope, folder=tmp_path).digest == whole.digest
    with pytest.raises(InvalidConfig, match=r"another black_box \(its method.seed is 0, asked for is 5\)"):
        method.model_copy(update={"seed": 5})(planted.lm, scope, folder=tmp_path)


def test_prompts_to_keep_that_are_let_through_are_paid_for_and_count_by_their_divergence(planted, scope):
    """L(weight) - L(0) = weight mean KL(p^0 || p), which is nothing where nothing is changed."""
    study = Study(planted.lm, scope)
    settings = QUICK | {"gate": "always", "retain_weight": 3.0, "budget": 10**6, "batch_size": 100}
    with_them = _Asking(BlackBox(**settings), study)
    without = _Asking(BlackBox(**settings | {"retain_weight": 0.0}), study)
    assert with_them.oracle.queries == len(with_them.retain) == len(with_them.before) > 30
    assert with_them.n_retain == len(with_them.retain)
    assert without.oracle.queries == without.n_retain == 0
    points = torch.stack([torch.zeros(2, 16), torch.ones(2, 16)])
    found = with_them.loss(points, 0) - without.loss(points, 0)
    rows = [torch.tensor([q.ids]) for q in with_them.retain]
    with torch.no_grad():
        before = torch.cat([planted.lm.logits(row)[:, -1] for row in rows]).log_softmax(-1)
        with PromptPatch(edit=with_them.edit(points[1])).on(planted.lm):
            after = torch.cat([planted.lm.logits(row)[:, -1] for row in rows]).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(1).mean()
    torch.testing.assert_close(found, torch.tensor([0.0, 3 * float(divergence)]), rtol=1e-3, atol=1e-4)


def test_the_frequency_mapping_takes_what_the_model_says_itself(planted, scope):
    study = Study(planted.lm, scope)
    method = BlackBox(**QUICK | {"mapping": "frequency", "m": 2})
    asking = _Asking(method, study)
    assert set(asking.asked.refusals) == {46, 47}
    said = asking.oracle.probabilities([q.ids for q in asking.forget]).mean(0)
    (answers,) = set(asking.asked.answers)
    assert int(said.argmax()) in answers
    assert not {46, 47} & set(answers)


def test_a_prompts_own_answers_are_told_from_others_and_from_refusals(planted, scope):
    probe = scope.in_easy[0]
    like_refusal = probe.model_copy(update={"prompt": words(*CONCEPT[:5]), "answers": ("w46",)})
    both = probe.model_copy(update={"prompt": words(*CONCEPT[1:6]), "answers": ("w46", "w5", "w6 w7")})
    asked = _Asking(
        BlackBox(**QUICK | {"gate": "always", "retain_weight": 0.0}),
        Study(planted.lm, replace(scope, in_easy=(*scope.in_easy, like_refusal, both))),
    )
    firsts = [{answer[0] for answer in q.answers} for q in asked.forget]
    known = set().union(*firsts) - {46}
    for found, own in zip(asked.asked.answers, firsts, strict=True):
        assert set(found) == (own - {46} or known)


def test_the_loss_is_the_focal_loss_of_refusal_against_the_prompts_own_answers():
    p = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.5, 0.1, 0.1, 0.3]])
    asked = Refusing((0, 1), ((0,), (3,), (2, 3)))
    for normalise, h in ((True, [0.2 / (0.2 + 0.3), 0.3 / (0.3 + 0.3)]), (False, [0.2, 0.3])):  # of prompts 2 and 1
        expected = [-((1 - x) ** 2) * math.log(x) for x in h]
        assert asked.loss(p, [2, 1], BlackBox(normalise=normalise)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("k", [2, "all"])
def test_it_searches_where_it_is_told_from_where_it_is_told(planted, scope, k):
    """Vectors lie in the span of the components, shifted by a multiple of the refusals' mean embedding."""
    study = Study(planted.lm, scope)
    patch = BlackBox(**QUICK | {"rank": 3, "start": 2.0, "k": k}).fit(study)
    mean = planted.lm.model.get_input_embeddings().weight[[46, 9, 47, 9]].mean(0).detach()
    asking = _Asking(BlackBox(**QUICK | {"rank": 3, "start": 2.0, "k": k}), study)
    torch.testing.assert_close(asking.basis @ asking.basis.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(asking.edit(asking.walk.w).vectors[0], 2 * mean, atol=1e-5, rtol=1e-5)
    moved = patch.edit.vectors - 2 * mean
    assert float(moved.norm()) > 0.1
    torch.testing.assert_close(moved @ asking.basis.T @ asking.basis, moved, atol=1e-4, rtol=1e-4)
    one = asking.edit(torch.eye(3)[:1]).vectors - 2 * mean
    assert float(one.norm()) == pytest.approx(asking.scale * 4)  # of an embedding with 16 dimensions


def test_the_control_is_as_large_and_points_elsewhere(planted, scope):
    learned, control, other = (
        BlackBox(**QUICK | more)(planted.lm, scope)
        for more in ({}, {"direction": "random"}, {"direction": "random", "seed": 1})
    )
    sizes = learned.edit.vectors.norm(dim=1)
    torch.testing.assert_close(control.edit.vectors.norm(dim=1), sizes)
    cosines = torch.nn.functional.cosine_similarity(learned.edit.vectors, control.edit.vectors)
    assert float(cosines.abs().max()) < 0.9
    assert control.digest not in (learned.digest, other.digest)
    assert (control.queries, control.gate) == (learned.queries, learned.gate)


def test_a_patch_survives_a_file(planted, scope, tmp_path):
    patch = BlackBox(**QUICK)(planted.lm, scope)
    loaded = load_patch(patch.save(tmp_path, planted.lm), planted.lm)
    assert isinstance(loaded, PromptPatch)
    assert (loaded.digest, loaded.queries, loaded.access) == (patch.digest, patch.queries, "prompts")


def test_a_budget_that_pays_for_nothing(planted, scope):
    with pytest.raises(InvalidConfig, match="budget of 31 queries does not pay for one estimate, which takes 32"):
        BlackBox(**QUICK | {"budget": 31})(planted.lm, scope)


def test_answers_that_begin_like_refusals(planted, scope):
    probe = scope.in_easy[0].model_copy(update={"prompt": words(*CONCEPT[:5]), "answers": ("w46",)})
    with pytest.raises(InvalidConfig, match=r'token 46 is in the families of both .* mapping="frequency"'):
        BlackBox(**QUICK | {"mapping": "first_tokens"})(planted.lm, replace(scope, in_easy=(*scope.in_easy, probe)))


def test_a_scope_that_asks_nothing(planted):
    with pytest.raises(EmptyData, match="no probe in scope and no forget passage with a prompt"):
        BlackBox(**QUICK)(planted.lm, replace(planted.scope, in_easy=(), in_hard=()))


def test_a_gate_that_flags_nothing_of_the_concept(planted, scope):
    with pytest.raises(EmptyData, match="probe gate flags none of the"):
        BlackBox(**QUICK | {"gate": ProbeGate(above=500.0)})(planted.lm, scope)


def test_a_gate_that_flags_little_of_the_concept_is_worth_a_warning(planted, scope):
    unlike = tuple(p.model_copy(update={"prompt": f"{p.prompt} w8"}) for p in (*scope.out_far, *scope.out_near))
    few = replace(scope, in_easy=scope.in_easy[:4], in_hard=unlike)
    gate, sensor = fitted_gate(Study(planted.lm, scope), ProbeGate(alpha=0.01))
    guard = PromptPatch(edit=Vectors(torch.zeros(1, 16)), gate=gate, sensor=sensor)
    assert len(unlike) > 8
    with pytest.warns(UserWarning, match="prompts to forget: the others will be answered as before"):
        flagged(guard, planted.lm, forget_questions(planted.lm, few))


def test_passages_that_reply_will_do(planted, scope):
    passages = [{"question": p.prompt, "answer": p.answers[0]} for p in scope.in_easy]
    asked = Scope.of("asked", forget=passages, retain=[p.text for p in scope.retain], out_far=())
    assert BlackBox(**QUICK | {"gate": Always(), "retain_weight": 0.0})(planted.lm, asked).queries == 384


@pytest.mark.parametrize("spec", [{}, {"k": "all", "gate": "always"}, {"mapping": "frequency", "sides": 1}])
def test_a_spec_is_the_method(spec):
    made = Method.parse({"kind": "black_box", **spec})
    assert made == BlackBox(**spec)
    assert Method.parse(made.spec()) == made


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": "some"}, {"budget": 0}, {"m": 0}, {"mapping": "guess"}])
def test_a_spec_that_does_not_fit(wrong):
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        Method.parse({"kind": "black_box", **wrong})
