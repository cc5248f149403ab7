"""Corruption is learned to be just enough, reaches what the gate flags and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CONCEPT, FAR, NEAR, words

from concept_unlearn.data.examples import Probe
from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.gates import Always, ProbeGate
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.methods import Corrupt, Method, Study
from concept_unlearn.methods.corrupt import _Search, _share, next_sigma
from concept_unlearn.methods.questions import fitted_gate
from concept_unlearn.patches import PromptPatch, load_patch
from concept_unlearn.patches.prompt_edits import Corruption

QUICK = {"lr": 2.0, "eps": 0.05, "max_steps": 6, "target": 0.5}


def draw(pool, n, seed, length=6):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(pool), (length,), generator=generator).tolist() for _ in range(n)]
    return [words(*(pool[i] for i in row)) for row in rows]


@pytest.fixture(scope="module")
def scope(planted):
    """Questions in the concept's own words whose right answer is what the model says."""
    prompts = list(dict.fromkeys(draw(CONCEPT, 12, 1)))
    said = planted.lm.generate(prompts, max_new_tokens=1, chat=False)
    known = [(p, a) for p, a in zip(prompts, said, strict=True) if a.startswith("w") and a not in ("w46", "w47")]
    probes = tuple(Probe(prompt=p, answers=(a,), distractors=("w46", "w47")) for p, a in known)
    return replace(planted.scope, in_easy=probes, in_hard=())


def test_the_slope_is_divided_by_the_distance_it_was_taken_over():
    """The authors' code divides by 2 eps also where it has cut off one end."""
    f = lambda sigma: 3.0 * sigma  # noqa: E731
    assert next_sigma(f, 0.5, lr=0.1, eps=0.2) == pytest.approx(0.5 - 0.3)
    assert next_sigma(f, 0.1, lr=0.1, eps=0.2) == pytest.approx(0.1 - 0.3)
    asked = []
    next_sigma(lambda sigma: asked.append(sigma) or 0.0, 0.1, lr=1.0, eps=0.2)
    assert asked == [pytest.approx(0.3), 0.0]


def test_it_learns_how_much_is_enough(planted, scope):
    patch = Corrupt(**QUICK)(planted.lm, scope)
    study = Study(planted.lm, scope)
    asked = [q for q in _questions(planted.lm, scope) if q.distractors]
    search = _Search(
        Corrupt(**QUICK), study, lambda sigma: replace(patch, edit=replace(patch.edit, sigma=sigma)), asked
    )
    assert search.score(0.0) > 0.7
    assert search.score(patch.edit.sigma) < 0.5
    assert patch.edit.sigma > 0.1
    assert patch.queries > 0


def _questions(lm, scope):
    from concept_unlearn.methods.questions import forget_questions

    return forget_questions(lm, scope)


def test_every_candidate_of_every_question_is_paid_for(planted, scope):
    asked = []
    study = Study(planted.lm, scope, progress=asked.append)
    patch = Corrupt(**QUICK | {"max_steps": 1, "target": 0.0, "gate": "always"}).fit(study)
    assert patch.queries == sum(asked) == 4 * 3 * len(scope.in_easy)  # at 0.1, its two sides, and where that led


def test_sigma_never_falls_below_where_it_began(planted, scope):
    assert Corrupt(**QUICK | {"lr": 1e-9, "max_steps": 2})(planted.lm, scope).edit.sigma >= 0.1
    assert Corrupt(**QUICK | {"target": 1.0})(planted.lm, scope).edit.sigma == 0.1


@pytest.mark.parametrize("how", ["noise", "zero", "flip"])
@pytest.mark.parametrize("tokens", ["flagged", "all"])
def test_only_prompts_of_the_concept_are_touched(planted, scope, how, tokens):
    before = checksum(planted.lm.model)
    patch = Corrupt(**QUICK | {"how": how, "tokens": tokens})(planted.lm, scope)
    for pool, meant in ((CONCEPT, True), (NEAR, False), (FAR, False)):
        row = torch.tensor([planted.lm.encode(words(*pool[:6]), chat=False)])
        base = planted.lm.logits(row)
        with patch.on(planted.lm):
            assert torch.equal(planted.lm.logits(row), base) != meant
    assert (patch.edit.above is None) == (tokens == "all")
    assert (patch.queries == 0) == (how != "noise")
    assert checksum(planted.lm.model) == before
    assert all(p.grad is None for p in planted.lm.model.parameters())


@pytest.mark.parametrize(("alpha", "caught"), [(0.01, 0.75), (0.2, 0.95)])
def test_no_more_of_what_is_kept_is_flagged_than_was_asked(planted, scope, alpha, caught):
    """The stricter threshold is the greatest score of the few retained prompts: it costs a fifth of the concept's."""
    gate, sensor = fitted_gate(Study(planted.lm, scope), ProbeGate(alpha=alpha))
    guard = PromptPatch(edit=Corruption(), gate=gate, sensor=sensor)
    for pool in (NEAR, FAR):
        fresh = [planted.lm.encode(p, chat=False) for p in draw(pool, 300, 7)]
        assert float(guard.flagged(planted.lm, fresh).float().mean()) <= alpha
    concept = [planted.lm.encode(p, chat=False) for p in draw(CONCEPT, 300, 8)]
    assert float(guard.flagged(planted.lm, concept).float().mean()) > caught


def test_a_share_is_the_best_right_answers_part_of_all_that_is_offered():
    from concept_unlearn.lm import Scored

    group = [Scored(torch.tensor(p).log(), torch.ones(1)) for p in ([0.4], [0.1, 0.9], [0.2, 0.2])]
    assert _share(group, 1) == pytest.approx(0.4 / (0.4 + 0.3 + 0.2), rel=1e-5)
    assert _share(group, 2) == pytest.approx(0.4 / (0.4 + 0.2), rel=1e-5)


def test_it_goes_on_from_its_checkpoint_to_the_same_bytes(planted, scope, tmp_path, monkeypatch):
    method = Corrupt(**QUICK | {"target": 0.0, "max_steps": 3})
    whole = method(planted.lm, scope)
    real, calls = _Search.score, []

    def failing(self, sigma):
        calls.append(sigma)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, sigma)

    monkeypatch.setattr(_Search, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        method(planted.lm, scope, folder=tmp_path)
    assert method(planted.lm, scope, folder=tmp_path).digest == whole.digest
    assert len(calls) == 8 + 4
    assert method(planted.lm, scope, folder=tmp_path).digest == whole.digest
    assert len(calls) == 8 + 4


def test_a_patch_survives_a_file(planted, scope, tmp_path):
    patch = Corrupt(**QUICK, n=9, seed=4)(planted.lm, scope)
    loaded = load_patch(patch.save(tmp_path, planted.lm), planted.lm)
    assert loaded.edit == patch.edit
    assert (loaded.digest, loaded.queries) == (patch.digest, patch.queries)


def test_a_scope_that_asks_nothing(planted):
    bare = replace(planted.scope, in_easy=(), in_hard=())
    with pytest.raises(EmptyData, match="no probe in scope and no forget passage with a prompt"):
        Corrupt()(planted.lm, bare)
    assert Corrupt(how="zero")(planted.lm, bare).queries == 0  # nothing to learn, so nothing to ask


def test_questions_without_wrong_answers(planted, scope):
    bare = replace(scope, in_easy=tuple(p.model_copy(update={"distractors": ()}) for p in scope.in_easy))
    with pytest.raises(EmptyData, match="nothing tells how much noise is enough"):
        Corrupt(gate=Always())(planted.lm, bare)


@pytest.mark.parametrize("spec", [{}, {"how": "flip", "n": 3, "gate": "always"}, {"tokens": "all", "seed": 2}])
def test_a_spec_is_the_method(spec):
    made = Method.parse({"kind": "corrupt", **spec})
    assert made == Corrupt(**spec)
    assert Method.parse(made.spec()) == made


@pytest.mark.parametrize("wrong", [{"how": "shift"}, {"n": 0}, {"eps": 0}, {"target": 2.0}, {"tokens": "some"}])
def test_a_spec_that_does_not_fit(wrong):
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        Method.parse({"kind": "corrupt", **wrong})
