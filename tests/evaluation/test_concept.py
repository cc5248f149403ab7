"""The concept benchmark: right is right, what is not touched counts as kept, and records add up to the summary."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_sae, words

from concept_unlearn.data.examples import Probe
from concept_unlearn.data.scope import Scope
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import EmptyData
from concept_unlearn.evaluation.concept import ConceptBenchmark, Rows, perplexity_ratio, read_texts
from concept_unlearn.evaluation.cost import measure_cost
from concept_unlearn.evaluation.probes import probe_rows, replies
from concept_unlearn.patches import FeaturePatch

PROMPTS = [words(i, i + 1, i + 2) for i in range(7, 30)]


@pytest.fixture
def scope(lm):
    said = lm.generate(PROMPTS, max_new_tokens=1, chat=False)
    answered = [(p, s) for p, s in zip(PROMPTS, said, strict=True) if s.startswith("w")]
    right = [{"prompt": p, "answers": s, "distractors": [words(46), words(47)]} for p, s in answered]
    wrong = [{"prompt": words(30, 31, i), "answers": "never"} for i in (32, 33)]
    texts = [words(*range(i, i + 8)) for i in range(7, 31)]
    return Scope.of(
        "tiny", forget=texts[:8], near=texts[8:12], retain=texts[12:],
        in_easy=right[:4], in_hard=[{**right[4], "chat": False}, *wrong], out_near=right[5:8], out_far=right[8:10],
    )  # fmt: skip


@pytest.fixture
def patch():
    return FeaturePatch(dictionary=make_sae("standard"), features=[1, 3], edit=DenseClamp(to=-30.0))


def test_a_probe_is_right_if_the_model_says_an_accepted_answer(lm, scope):
    rows = probe_rows(lm, [*scope.in_easy, *scope.in_hard])
    assert [r.generated_right for r in rows] == [True] * 5 + [False] * 2
    for row, probe in zip(rows, scope.in_easy, strict=False):
        (group,) = lm.logprobs([probe.prompt], [probe.answers])
        assert row.answer_logprob == pytest.approx(max(float(s.logprobs.mean()) for s in group), rel=1e-4)


def test_ranking_is_per_byte_of_the_answer(lm):
    prompt, short, long = words(7, 8), words(9), words(10, 11, 12)
    ((a, b),) = lm.logprobs([prompt], [[short, long]])
    per_byte = [float(s.logprobs.sum()) / len(t) for s, t in ((a, short), (b, long))]
    (row,) = probe_rows(lm, [Probe(prompt=prompt, answers=(short,), distractors=(long,))])
    assert row.ranked_right == (per_byte[0] > per_byte[1])


def test_without_distractors_other_answers_serve(lm):
    probes = [Probe(prompt=words(7, i), answers=(words(20 + i),)) for i in range(8, 12)]
    assert all(row.ranked_right is not None for row in probe_rows(lm, probes))
    assert probe_rows(lm, probes[:1])[0].ranked_right is None


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_and_order_change_no_record(lm, scope, batch_size):
    probes = [*scope.in_easy, *scope.in_hard, *scope.out_near]
    want = probe_rows(lm, probes)
    found = probe_rows(lm, probes[::-1], batch_size=batch_size)[::-1]
    for a, b in zip(want, found, strict=True):
        assert a.model_dump(exclude={"answer_logprob"}) == b.model_dump(exclude={"answer_logprob"})
        assert a.answer_logprob == pytest.approx(b.answer_logprob, rel=1e-4)


@torch.no_grad()
def test_perplexity_weighs_tokens_not_texts(lm, scope):
    rows = read_texts(lm, scope.retain, 5)
    assert all(r.n_tokens == 4 for r in rows)
    nll = 0.0
    for passage in scope.retain:
        ids = torch.tensor([lm.encode(passage.text, chat=False)[:5]])
        logits = lm.logits(ids)[0, :-1].log_softmax(-1)
        nll -= float(logits.gather(-1, ids[0, 1:, None]).sum())
    assert -sum(r.logprob for r in rows) == pytest.approx(nll, rel=1e-4)
    assert perplexity_ratio(rows, rows) == 1


def test_a_model_against_itself_has_lost_nothing(lm, scope):
    benchmark = ConceptBenchmark(scope)
    base = benchmark.observe(lm)
    summary = benchmark.summarise(base, benchmark.observe(lm))
    assert summary["in_easy/generated_accuracy"]["relative"].value == 1
    assert summary["in_hard/generated_accuracy"]["base"].value == pytest.approx(1 / 3)
    assert summary["general/perplexity"]["relative"].value == 1
    assert summary["out_near/touched"]["patched"].value == 0
    assert summary["in_scope/gibberish"]["change"].value == 0


def test_a_patch_shows_in_every_measure(lm, scope, patch):
    benchmark = ConceptBenchmark(scope)
    base, patched = benchmark.observe(lm), benchmark.observe(lm, patch)
    summary = benchmark.summarise(base, patched)
    assert summary["in_easy/generated_accuracy"]["patched"].value < 1
    assert summary["out_near/touched"]["patched"].value == 1
    assert summary["general/touched"]["patched"].value == 1
    tokens = sum(r.n_tokens for r in base.texts["general"])
    change = sum(b.logprob - p.logprob for b, p in zip(base.texts["general"], patched.texts["general"], strict=True))
    assert summary["general/perplexity"]["relative"].value == pytest.approx(math.exp(change / tokens))
    right = [r.generated_right for r in patched.probes["in_easy"]]
    assert summary["in_easy/generated_accuracy"]["patched"].value == pytest.approx(sum(right) / len(right))


def test_replies_alone_are_what_the_whole_rows_hold(lm, scope):
    probes = (*scope.in_easy, *scope.in_hard)
    alone, rows = replies(lm, probes), probe_rows(lm, probes)
    assert [(r.ids, r.right) for r in alone] == [(list(r.generated_ids), r.generated_right) for r in rows]
    assert any(r.right for r in alone)
    assert not all(r.right for r in alone)


def test_generations_are_judged_by_the_model_without_the_patch(lm, scope, patch):
    rows = ConceptBenchmark(scope).observe(lm, patch)
    row, surprise = rows.probes["in_easy"][0], rows.surprise["in_easy"][0]
    ((score,),) = lm.score([lm.encode(row.prompt, chat=False)], [[list(row.generated_ids)]])
    assert surprise == pytest.approx(-float(score.logprobs.mean()), rel=1e-4)


def test_rows_survive_json_to_the_last_digit(lm, scope):
    rows = ConceptBenchmark(scope).observe(lm)
    assert Rows.model_validate_json(rows.model_dump_json()) == rows


def test_progress_counts_every_step(lm, scope):
    steps, benchmark = [], ConceptBenchmark(scope)
    benchmark.observe(lm, progress=steps.append)
    assert sum(steps) == benchmark.n_steps


def test_limits_are_kept(lm, scope):
    rows = ConceptBenchmark(scope, max_probes=2, max_passages=3, max_tokens=4).observe(lm)
    assert {len(r) for r in rows.probes.values()} == {2}
    assert {len(r) for r in rows.texts.values()} == {3}
    assert {t.n_tokens for r in rows.texts.values() for t in r} == {3}


def test_a_scope_without_probes_of_the_concept_cannot_be_scored():
    scope = Scope.of("tiny", forget=[words(7)], retain=[words(8)], out_far=[])
    with pytest.raises(EmptyData, match="no in_easy or in_hard probe"):
        ConceptBenchmark(scope)


def test_cost_is_the_size_of_what_is_saved_and_a_paired_time(lm, patch):
    cost = measure_cost(lm, patch, [[7, 8, 9, 10]])
    assert cost.n_bytes == sum(t.numel() * t.element_size() for t in patch.tensors().values())
    assert cost.n_parameters == sum(t.numel() for t in patch.tensors().values())
    assert cost.latency > 0
