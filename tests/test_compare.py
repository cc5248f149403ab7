"""Everybody meets the same examples and attacks; what was stopped goes on; a checkpoint stands beside patches."""

from __future__ import annotations

import copy

import pytest
import torch

from concept_unlearn import LM, ConceptBenchmark, Site, Steer, Suppress, WeightPatch, compare
from concept_unlearn.compare import Comparison
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.evaluation.attacks import Attack
from concept_unlearn.report import Report
from concept_unlearn.weights import Dense

LEAK = "in_easy/generated_accuracy"


@pytest.fixture(scope="module")
def benchmark(planted):
    return ConceptBenchmark(planted.scope, max_passages=4)


@pytest.fixture(scope="module")
def patches(planted):
    methods = {"sae": Suppress(dictionaries=(planted.first,), n=2), "means": Steer(sites=(Site("resid_pre", 0),))}
    return {name: method(planted.lm, planted.scope) for name, method in methods.items()}


@pytest.fixture(scope="module")
def attacks():
    return [Attack.parse("jailbreak_prefix"), Attack.parse({"kind": "in_context", "k": 2})]


@pytest.fixture(scope="module")
def report(planted, benchmark, patches, attacks):
    weak = patches | {"weak": patches["sae"].at(0.5)}
    return compare(planted.lm, weak, benchmark, attacks=attacks, retrained=planted.lm)


def test_every_patch_has_every_metric_and_every_attack(report, benchmark):
    assert [entry.name for entry in report.entries] == ["sae", "means", "weak"]
    for entry in (report.base, report.retrained, *report.entries):
        assert set(entry.results) == {metric.name for metric in benchmark.metrics}
    for entry in (report.base, *report.entries):
        assert set(entry.attacks) == {"jailbreak_prefix", "in_context"}
    assert report.base.results[LEAK].value == 1
    assert report.main.results[LEAK].value < 1


def test_a_weakened_patch_is_shown_as_it_was_made_too(report):
    sae, _, weak = report.entries
    assert sae.as_made == {}
    assert weak.strength == 0.5
    assert weak.as_made == sae.results
    assert weak.results != sae.results


def test_the_untouched_model_as_its_own_reference_leaves_no_gap(report):
    assert report.retrained.results == report.base.results
    assert all(m.value in (0, None) for name, m in report.base.results.items() if name.endswith("touched"))


def test_what_was_said_stands_beside_its_question(report, planted):
    for name, questions in report.questions.items():
        for entry in (report.base, *report.entries):
            assert name not in entry.said or len(entry.said[name]) == len(questions)
    right = [
        any(answer in said.split() for answer in question.answers)
        for question, said in zip(report.questions["in_easy"], report.main.said["in_easy"], strict=True)
    ]
    assert sum(right) / len(right) == report.main.results[LEAK].value


def test_stopped_and_started_again_it_gives_the_same(
    planted, benchmark, patches, attacks, report, tmp_path, monkeypatch
):
    """Killed after each pass over the model in turn, until one run comes through."""
    calls, limit, score, generate = 0, 0, LM.score, LM.write

    def counted(original):
        def call(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return original(*arguments, **settings)

        return call

    monkeypatch.setattr(LM, "score", counted(score))
    monkeypatch.setattr(LM, "write", counted(generate))
    weak = patches | {"weak": patches["sae"].at(0.5)}
    for _ in range(100):
        calls, limit = 0, 4
        try:
            found = compare(planted.lm, weak, benchmark, attacks=attacks, retrained=planted.lm, folder=tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert [e.model_copy(update={"cost": None}) for e in found.entries] == [
        e.model_copy(update={"cost": None}) for e in report.entries
    ]
    calls, limit = 0, 0
    again = Comparison(planted.lm, benchmark, attacks=attacks, scope=planted.scope, folder=tmp_path)
    assert again.entry("sae", patches["sae"]).results == report.main.results


def test_a_checkpoint_is_what_its_patch_is(planted, benchmark):
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(planted.lm.model.named_parameters())[name]
    patch = WeightPatch({name: Dense(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))})
    other = copy.deepcopy(planted.lm.model)
    with torch.no_grad():
        dict(other.named_parameters())[name].add_(patch.deltas[name].dense())
    report = compare(planted.lm, {"patch": patch, "checkpoint": LM(other, planted.lm.tokenizer)}, benchmark)
    one, two = report.entries
    assert one.results == two.results
    assert one.results != report.base.results
    assert (one.cost is None, two.cost is None) == (False, True)


def test_one_checkpoint_beside_two_models_has_two_observations(planted, benchmark, tmp_path):
    other = copy.deepcopy(planted.lm.model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    other = LM(other, planted.lm.tokenizer)
    for base, checkpoint in ((planted.lm, other), (other, other)):
        compare(base, {"checkpoint": checkpoint}, benchmark, folder=tmp_path)


def test_a_checkpoint_that_differs_where_no_fingerprint_looks_is_another_model(planted, benchmark, attacks, tmp_path):
    other = copy.deepcopy(planted.lm.model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.numel() > 2 * 64:  # the fingerprint looks at every so manyth value from the first on
                parameter.view(-1)[1 :: max(parameter.numel() // 64, 1)] += 0.5
    twin = LM(other, planted.lm.tokenizer, name="tiny")
    assert twin.fingerprint == planted.lm.fingerprint
    settings = {"attacks": attacks, "folder": tmp_path, "scope": planted.scope}
    compare(planted.lm, {}, benchmark, **settings)
    (entry,) = compare(planted.lm, {"untouched": twin}, benchmark, **settings).entries
    alone = compare(twin, {}, benchmark, attacks=attacks, scope=planted.scope)
    assert entry.attacks == alone.base.attacks
    assert entry.said == alone.base.said


def test_a_model_alone_is_a_report(planted, benchmark, tmp_path):
    report = compare(planted.lm, {}, benchmark)
    assert report.main == report.base
    assert Report.load(report.save(tmp_path)) == report


def test_attacks_need_to_know_what_was_forgotten(planted, benchmark, monkeypatch):
    monkeypatch.setattr(ConceptBenchmark, "request", property(lambda self: None))
    with pytest.raises(InvalidConfig, match="attacks need scope="):
        Comparison(planted.lm, benchmark, attacks=[Attack.parse("jailbreak_prefix")])
