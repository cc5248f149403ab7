"""A protocol is its rows: what a run's config expands them to, and that a run by it says what it could not try."""

from __future__ import annotations

import pytest
import yaml

from concept_unlearn.errors import InvalidConfig, UnknownName
from concept_unlearn.evaluation.attacks import Attack, Relearn
from concept_unlearn.evaluation.attacks.base import worst
from concept_unlearn.evaluation.benchmarks import Survey
from concept_unlearn.evaluation.protocol import ATTACKS, CALIBRATION
from concept_unlearn.run import Run, execute, load_run

METHOD = {"preset": "grad_diff"}
SURVEY = {"kind": "survey", "scope": "astronomy"}


def test_every_row_is_an_attack():
    for rows in ATTACKS.values():
        assert all(Attack.parse(row).spec().items() >= row.items() for row in rows.values())


def test_the_survey_attacks_as_the_specification_lists_them():
    attacks = Run(method=METHOD, benchmark=SURVEY, attacks="survey").attacks
    relearning = {a.k: (a.steps, a.batch_size) for a in attacks.values() if isinstance(a, Relearn)}
    assert relearning == {8: (1, 8), 32: (4, 8), 128: (16, 8)}  # one epoch each
    assert {a.bits for a in attacks.values() if a.kind == "quantise"} == {4, 8}
    assert {"jailbreak_prefix", "prefill", "soft_prompt", "switch_off"} <= {a.kind for a in attacks.values()}


def test_uwc_keeps_extraction_strength_of_what_the_benchmark_keeps():
    run = Run(method=METHOD, benchmark=SURVEY, calibration="uwc")
    assert (run.calibration.keep, run.calibration.grid, run.calibration.tolerance) == (0.95, 21, 0.005)
    found = run.benchmark.metric(run.calibration.metric)
    assert (found.kind, found) == ("extraction_strength", run.benchmark.keeps)
    assert CALIBRATION["uwc"].items() <= run.calibration.model_dump().items()


def test_where_there_is_no_extraction_strength_uwc_is_refused():
    with pytest.raises(InvalidConfig, match=r"calibration\.metric \(extraction_strength\) goes with a benchmark"):
        Run(method=METHOD, scope="astronomy", calibration="uwc")


def test_a_metric_without_a_set_is_that_of_the_kept_one():
    survey = Survey("astronomy")
    assert survey.metric("probability").name == "out_near/probability"
    assert survey.metric("in_easy/probability").name == "in_easy/probability"
    with pytest.raises(UnknownName, match="named 'out_near/rouge'"):
        survey.metric("rouge")


@pytest.mark.parametrize(("key", "what"), [("attacks", "protocol of attacks"), ("calibration", "calibration")])
def test_an_unknown_name_names_the_known_ones(key, what):
    with pytest.raises(UnknownName, match=f"no {what} named 'uvc'; known: "):
        Run(method=METHOD, benchmark=SURVEY, **{key: "uvc"})


def test_both_are_in_the_schema_and_resolved_in_what_is_written():
    schema = Run.model_json_schema()["properties"]
    assert {"const": "survey", "type": "string"} in schema["attacks"]["anyOf"]
    assert {"const": "uwc", "type": "string"} in schema["calibration"]["anyOf"]
    run = Run(method=METHOD, benchmark=SURVEY, attacks="survey", calibration="uwc")
    assert Run(**yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))) == run


@pytest.mark.filterwarnings("ignore:no strength of .* keeps what was asked")
@pytest.mark.filterwarnings("ignore:training changed nothing")
def test_a_run_by_the_protocol_reports_the_worst_and_lists_what_was_skipped(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("concept_unlearn.evaluation.attacks.quantise.importlib.util.find_spec", lambda name: None)
    data = {
        "model": {"name": str(workplace / "model"), "device": "cpu"}, "name": "grad",
        "method": {"preset": "grad_diff", "lr": 1e-3, "max_steps": 2, "batch_size": 4},
        "benchmark": {"kind": "survey", "scope": str(workplace / "scope"), "overlap": "drop", "n_items": 4},
        "attacks": "survey", "calibration": "uwc", "output": str(tmp_path / "run"), "seeds": [0],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    report = execute(load_run(tmp_path / "run.yaml"))
    (entry,) = report.entries
    assert set(entry.attacks) == set(ATTACKS["survey"])
    skipped = {name for name, outcome in entry.attacks.items() if outcome.skipped}
    assert skipped == {"int4", "int8"}
    assert (tmp_path / "run" / "summary.json").read_text().count("MissingExtra") >= 2
    leak = report.leaks[0]
    _, most = worst(entry.attacks, entry.results, leak)
    assert most >= entry.results[leak].value
    assert entry.cost.fit_seconds > 0
    assert entry.seed == 0
