"""A prefix is chosen by asking alone, for what it does to prompts to forget and to prompts to keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CONCEPT, FAR, NEAR, words

from concept_unlearn.data.examples import Probe
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.gates import SequenceGate
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.methods import Method, Prefix, Study
from concept_unlearn.methods.prefix import _Trial
from concept_unlearn.patches import PrefixPatch, load_patch

TEXTS = ("w30 ", "w46 w47 w46 ", "w12 w40 ", "w47 ", "w31 w32 w33 ")
QUICK = {"prefixes": TEXTS, "batch_size": 3, "budget": 400}


@pytest.fixture(autouse=True)
def refusals(monkeypatch):
    """Two tokens that no answer begins with."""
    monkeypatch.setattr("concept_unlearn.methods.refusing.refusal_texts", lambda: ["w46 w9", "w47 w9"])


@pytest.fixture(scope="module")
def scope(planted):
    """Questions in the concept's own words, answered by what the model says, unless that is a refusal here."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, pool in {"in_easy": CONCEPT, "out_near": NEAR, "out_far": FAR}.items():
        drawn = [torch.randperm(len(pool), generator=generator)[:5].tolist() for _ in range(16)]
        prompts = list(dict.fromkeys(words(*(pool[i] for i in row)) for row in drawn))
        said = planted.lm.generate(prompts, max_new_tokens=1, chat=False)
        known = [(p, a) for p, a in zip(prompts, said, strict=True) if a.startswith("w") and a not in ("w46", "w47")]
        found[name] = tuple(Probe(prompt=p, answers=(a,)) for p, a in known)
    return replace(planted.scope, in_hard=(), **found)


def losses(method, study):
    """Of each prefix and of none, on all prompts, by the patch itself."""
    trial = _Trial(method, study)
    asked = trial._asked()

    def said(patch, questions):
        with torch.no_grad(), patch.on(study.lm):
            return [study.lm.logits(torch.tensor([q.ids]))[0, -1].softmax(-1) for q in questions]

    found = []
    for text, ids in [*zip(method.prefixes, trial.ids, strict=True), ("", ())]:
        patch = PrefixPatch(text=text, ids=ids, gate=trial.gate, sensor=trial.sensor)
        p = torch.stack(said(patch, trial.forget))
        changes = zip(said(patch.at(0.0), trial.retain), said(patch, trial.retain), strict=True)
        kept = [float((q * (q / r).log()).sum()) for q, r in changes]
        loss = float(asked.loss(p, range(len(p)), method).mean())
        found.append(loss + method.retain_weight * sum(kept) / max(len(kept), 1))
    return found


@pytest.mark.parametrize("more", [{}, {"gate": "always", "retain_weight": 0.3}], ids=["gated", "always"])
def test_with_the_budget_to_try_all_on_all_the_best_is_chosen(planted, scope, more):
    study = Study(planted.lm, scope)
    method = Prefix(**QUICK | more | {"batch_size": 10**3, "budget": 10**6})
    expected = losses(method, study)
    assert min(expected[:-1]) < expected[-1], "none is better than nothing"
    assert method.fit(study).text == TEXTS[expected.index(min(expected[:-1]))]


def test_halving_spends_no_more_than_the_budget_and_the_client_counts(planted, scope):
    """Five prefixes and none on 3 prompts, then the better three and none on 3 more."""
    for budget, spent in ((18, 18), (29, 18), (30, 30)):
        passes = []
        handle = planted.lm.model.lm_head.register_forward_hook(lambda _, args, __, p=passes: p.append(len(args[0])))
        patch = Prefix(**QUICK | {"retain_weight": 0.0, "budget": budget})(planted.lm, scope)
        handle.remove()
        assert patch.queries == sum(passes) == spent
    assert Prefix(**QUICK)(planted.lm, scope).queries <= 400


@pytest.mark.parametrize("few", [{"in_easy": 1}, {"out_near": 0, "out_far": 1}], ids=["forget", "keep"])
def test_where_one_kind_of_prompt_is_used_up_the_other_decides(planted, scope, few):
    short = replace(scope, **{name: getattr(scope, name)[:n] for name, n in few.items()})
    method = Prefix(**QUICK | {"gate": "always", "batch_size": 1, "budget": 10**6})
    assert method(planted.lm, short).text in TEXTS


def test_prompts_that_are_not_of_the_concept_are_bit_identical(planted, scope):
    patch = Prefix(**QUICK)(planted.lm, scope)
    for pool, meant in ((CONCEPT, True), (NEAR, False), (FAR, False)):
        row = torch.tensor([planted.lm.encode(words(*pool[:6]), chat=False)])
        base = planted.lm.logits(row)
        with patch.on(planted.lm):
            assert torch.equal(planted.lm.logits(row), base) != meant


def test_what_is_written_is_written_behind_the_text(planted, scope):
    patch = Prefix(**QUICK)(planted.lm, scope)
    prompts = [p.prompt for p in scope.in_easy]
    flags = patch.flagged(planted.lm, [planted.lm.encode(p, chat=False) for p in prompts]).tolist()
    assert any(flags)
    by_hand = [f"{patch.text}{p}" if flag else p for p, flag in zip(prompts, flags, strict=True)]
    expected = planted.lm.generate(by_hand, max_new_tokens=4, chat=False)
    with patch.on(planted.lm):
        assert planted.lm.generate(prompts, max_new_tokens=4, chat=False) == expected


def test_strength_is_how_much_of_the_prefix_stands_there(planted):
    patch, lm = PrefixPatch(text="w40 w41 w42 w43", ids=(40, 41, 42, 43)), planted.lm
    rest = lm.encode(words(*CONCEPT[:4]), chat=False)
    for strength, inserted in (
        (0.0, []),
        (0.1, []),
        (0.5, [40, 41]),
        (1.0, [40, 41, 42, 43]),
        (1.25, [40, 41, 42, 43, 40]),
    ):
        at = 1 if rest[0] == lm.bos_id else 0
        expected = lm.generate_ids([[*rest[:at], *inserted, *rest[at:]]], max_new_tokens=4)
        with patch.at(strength).on(lm):
            assert lm.generate_ids([rest], max_new_tokens=4) == expected


def test_the_model_is_never_differentiated_nor_changed(planted, scope, monkeypatch):
    before = checksum(planted.lm.model)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    Prefix(**QUICK | {"gate": SequenceGate(alpha=0.05)})(planted.lm, scope)  # a probe gate is fitted by gradients
    assert checksum(planted.lm.model) == before


def test_a_patch_survives_a_file(planted, scope, tmp_path):
    patch = Prefix(**QUICK)(planted.lm, scope)
    loaded = load_patch(patch.save(tmp_path, planted.lm), planted.lm)
    assert isinstance(loaded, PrefixPatch)
    assert (loaded.digest, loaded.text, loaded.ids, loaded.queries, loaded.access) == (
        patch.digest, patch.text, patch.ids, patch.queries, "prompts",
    )  # fmt: skip


def test_a_budget_that_does_not_pay_for_a_round(planted, scope):
    with pytest.raises(
        InvalidConfig, match=r"budget of 17 queries does not pay .* each of 5 prefixes once, .* takes 18"
    ):
        Prefix(**QUICK | {"budget": 17, "retain_weight": 0.0})(planted.lm, scope)


def test_prefixes_that_do_nothing_are_worth_a_warning(planted, scope):
    with pytest.warns(UserWarning, match="no prefix of 1 brings the prompts to forget nearer to a refusal"):
        Prefix(**QUICK | {"prefixes": [""]})(planted.lm, scope)


def test_a_spec_is_the_method():
    made = Method.parse({"kind": "prefix", "prefixes": ["No. "], "mapping": "frequency"})
    assert made == Prefix(prefixes=("No. ",), mapping="frequency")
    assert Method.parse(made.spec()) == made
    assert Prefix().spec()["prefixes"]
