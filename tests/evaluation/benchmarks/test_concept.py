"""The concept benchmark: right is right, what is not touched counts as kept, and limits are kept."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_sae, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import EmptyData, InvalidConfig, UnknownName
from concept_unlearn.evaluation.benchmark import Benchmark
from concept_unlearn.evaluation.benchmarks import ConceptBenchmark
from concept_unlearn.evaluation.cost import measure_cost
from concept_unlearn.evaluation.measured import compared
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
        in_easy=right[:4], in_hard=[right[4], *wrong], out_near=right[5:8], out_far=right[8:10],
    )  # fmt: skip


@pytest.fixture
def patch():
    return FeaturePatch(dictionary=make_sae("standard"), features=[1, 3], edit=DenseClamp(to=-30.0))


def measured(benchmark, lm, patch=None):
    view, base = benchmark.observe(lm, patch), benchmark.observe(lm)
    return benchmark.measure(view.beside(original=base)), benchmark.measure(base.beside(original=base))


def test_a_probe_is_right_if_the_model_says_an_accepted_answer(lm, scope):
    found, _ = measured(ConceptBenchmark(scope), lm)
    assert found["in_easy/generated_accuracy"].values == (1, 1, 1, 1)
    assert found["in_hard/generated_accuracy"].values == (1, 0, 0)
    for logprob, probe in zip(found["in_easy/answer_logprob"].values, scope.in_easy, strict=True):
        (group,) = lm.logprobs([probe.prompt], [probe.answers])
        assert logprob == pytest.approx(max(float(s.logprobs.mean()) for s in group), rel=1e-4)


def test_ranking_is_per_byte_of_the_answer(lm):
    prompt, short, long = words(7, 8), words(9), words(10, 11, 12)
    ((a, b),) = lm.logprobs([prompt], [[short, long]])
    per_byte = [float(s.logprobs.sum()) / len(t) for s, t in ((a, short), (b, long))]
    probe = {"prompt": prompt, "answers": short, "distractors": [long]}
    found, _ = measured(
        ConceptBenchmark(Scope.of("t", forget=[words(9)], retain=[words(8)], in_easy=[probe], out_far=[])), lm
    )
    assert found["in_easy/ranked_accuracy"].value == (per_byte[0] > per_byte[1])


def test_without_distractors_other_answers_serve(lm):
    probes = [{"prompt": words(7, i), "answers": words(20 + i)} for i in range(8, 12)]
    for asked, n in ((probes, 4), (probes[:1], 0)):
        scope = Scope.of("t", forget=[words(9)], retain=[words(8)], in_easy=asked, out_far=[])
        assert measured(ConceptBenchmark(scope), lm)[0]["in_easy/ranked_accuracy"].n == n


@torch.no_grad()
def test_perplexity_weighs_tokens_not_texts(lm, scope):
    found, _ = measured(ConceptBenchmark(scope, max_tokens=5), lm)
    nll = 0.0
    for passage in scope.retain:
        ids = torch.tensor([lm.encode(passage.text, chat=False)[:5]])
        logits = lm.logits(ids)[0, :-1].log_softmax(-1)
        nll -= float(logits.gather(-1, ids[0, 1:, None]).sum())
    assert found["general/perplexity"].value == pytest.approx(math.exp(nll / (4 * len(scope.retain))), rel=1e-4)


def test_a_model_against_itself_has_lost_nothing(lm, scope):
    after, before = measured(ConceptBenchmark(scope), lm)
    for name, one in after.items():
        assert compared(one, before[name], "difference") == (0, 0, 0)
    assert after["out_near/touched"].value == 0
    assert after["general/touched"].value == 0


def test_a_patch_shows_in_every_measure(lm, scope, patch):
    after, before = measured(ConceptBenchmark(scope), lm, patch)
    assert after["in_easy/generated_accuracy"].value < 1
    assert after["out_near/touched"].value == after["general/touched"].value == 1
    assert after["general/perplexity"].value != before["general/perplexity"].value


def test_limits_are_kept(scope):
    benchmark = ConceptBenchmark(scope, max_probes=2, max_passages=3)
    sizes = {name: len(asked.examples) for name, asked in benchmark.sets.items()}
    assert sizes == dict.fromkeys(("in_easy", "in_hard", "out_near", "out_far"), 2) | dict.fromkeys(
        ("forget", "near", "general"), 3
    )


def test_halves_share_no_question(scope):
    tune, test = (ConceptBenchmark(scope, half=half) for half in ("tune", "test"))
    asked = [{p.prompt for p in b.sets["in_easy"].examples} for b in (tune, test)]
    assert not asked[0] & asked[1]
    assert {p.prompt for p in scope.in_easy} == asked[0] | asked[1]
    assert tune.digest != test.digest


def test_a_config_names_the_scope():
    found = Benchmark.parse({"kind": "concept", "scope": "chess", "half": "test", "max_probes": 3})
    assert found.spec()["scope"] == "chess"
    assert found.digest == Benchmark.parse(found.spec()).digest
    with pytest.raises(UnknownName, match="no concept named 'ches'"):
        Benchmark.parse({"kind": "concept", "scope": "ches"})
    for kind in ("concept", "survey"):
        with pytest.raises(InvalidConfig, match="scope: "):
            Benchmark.parse(kind)


def test_what_is_reported_on_one_half_is_made_from_the_other():
    found = Benchmark.parse({"kind": "concept", "scope": "chess", "half": "test"})
    assert found.request == found.scope.halves().tune
    assert found.digest == ConceptBenchmark(found.scope.halves().test).digest


def test_a_folder_is_named_so_that_it_can_be_loaded_again(workplace):
    found = ConceptBenchmark(str(workplace / "scope"), half="tune")
    again = Benchmark.parse(found.spec())
    assert again.digest == found.digest
    assert ConceptBenchmark(found.scope.halves().test).spec()["scope"] == str(workplace / "scope")


def test_what_it_keeps_and_what_leaks_are_among_its_metrics(scope):
    benchmark = ConceptBenchmark(scope)
    assert benchmark.metric(benchmark.keeps.name) == benchmark.keeps
    assert [benchmark.metric(m.name) for m in benchmark.leaks] == list(benchmark.leaks)
    assert {line.metric for line in benchmark.lines} <= {m.name for m in benchmark.metrics}
    with pytest.raises(UnknownName, match=r"known: .*general/perplexity"):
        benchmark.metric("general/perplexty")


def test_a_scope_without_probes_of_the_concept_cannot_be_scored():
    scope = Scope.of("tiny", forget=[words(7)], retain=[words(8)], out_far=[])
    with pytest.raises(EmptyData, match="no in_easy or in_hard probe"):
        ConceptBenchmark(scope)


def test_cost_is_the_size_of_what_is_saved_and_a_paired_time(lm, patch):
    cost = measure_cost(lm, patch, [[7, 8, 9, 10]])
    assert cost.n_bytes == sum(t.numel() * t.element_size() for t in patch.tensors().values())
    assert cost.n_parameters == sum(t.numel() for t in patch.tensors().values())
    assert cost.latency > 0
