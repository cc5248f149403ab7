"""A report is plain data: it is saved and loaded whole, and several become one only if they asked the same."""

from __future__ import annotations

import json

import pytest

from concept_unlearn.errors import CorruptArtifact, EmptyData, InvalidConfig, InvalidData
from concept_unlearn.report import Report


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strictly(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_was_saved_is_loaded_equal(rich_report, tmp_path):
    assert Report.load(rich_report.save(tmp_path)) == rich_report


def test_infinity_comes_back_as_a_number(rich_report, tmp_path):
    loaded = Report.load(rich_report.save(tmp_path)).entries[-1].results
    assert loaded["easy/leak"].value == float("-inf")
    assert loaded["text/perplexity"].value == float("inf")


def test_every_file_is_there_and_every_json_is_strict(rich_report, tmp_path):
    rich_report.save(tmp_path)
    files = {"report.html", "report.json", "summary.json", "rows.jsonl", "table.md", "tradeoff.svg"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in ("report.json", "summary.json"):
        strictly(tmp_path / name)


def test_saving_again_writes_the_same_bytes(rich_report, tmp_path):
    first, second = rich_report.save(tmp_path / "a"), Report.load(tmp_path / "a").save(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_folder_without_a_report_and_a_broken_one_are_told_apart(rich_report, tmp_path):
    with pytest.raises(InvalidData, match=r"no report.json"):
        Report.load(tmp_path)
    path = rich_report.save(tmp_path) / "report.json"
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "{}", json.dumps(json.loads(whole) | {"odd": 1})):
        path.write_text(broken)
        with pytest.raises(CorruptArtifact, match=r"report.json is no report"):
            Report.load(tmp_path)


def test_the_main_entry_is_the_first_or_else_the_untouched_model(made, entry):
    assert made(entry("a"), entry("b")).main.name == "a"
    assert made().main.name == "base"


def test_two_entries_of_one_name_need_different_seeds(made, entry):
    assert len(made(entry("a", seed=0), entry("a", seed=1)).groups["a"]) == 2
    with pytest.raises(InvalidConfig, match="'a' and have seed 1"):
        made(entry("a", seed=1), entry("a", seed=1))


def test_labels_name_the_seed_only_where_the_name_is_not_enough(made, entry):
    report = made(entry("a", seed=0), entry("b", seed=0), entry("a", seed=1))
    assert list(report.labelled) == ["a, seed 0", "b", "a, seed 1"]


def test_merging_keeps_seeds_together_and_tells_twins_apart_by_their_run(made, entry):
    runs = {
        "one": made(entry("a", seed=0), entry("b"), provenance={"n": 1}),
        "two": made(entry("a", seed=1), entry("b"), provenance={"n": 2}, retrained=entry("retrained")),
    }
    merged = Report.merged(runs)
    assert [(e.name, e.seed) for e in merged.entries] == [("a", 0), ("one/b", None), ("a", 1), ("two/b", None)]
    assert merged.retrained == runs["two"].retrained
    assert merged.provenance == {"one": {"n": 1}, "two": {"n": 2}}


def test_merging_one_report_changes_nothing_but_where_its_provenance_stands(rich_report):
    merged = Report.merged({"run": rich_report})
    assert merged == rich_report.model_copy(update={"provenance": {"run": rich_report.provenance}})


@pytest.mark.parametrize(
    ("field", "value"),
    [("digest", "d2"), ("model", "other"), ("fingerprint", "f2"), ("benchmark", "x"), ("leaks", ("near/accuracy",))],
)
def test_runs_that_do_not_ask_the_same_do_not_merge(made, entry, field, value):
    good, bad = made(entry(), fingerprint="f1"), made(entry(), **({"fingerprint": "f1"} | {field: value}))
    with pytest.raises(InvalidConfig, match=rf"^bad and good differ in {field}: "):
        Report.merged({"good": good, "fine": good.model_copy(update={"entries": ()}), "bad": bad})


def test_a_report_that_does_not_know_its_models_fingerprint_merges(made, entry):
    assert len(Report.merged({"a": made(entry("a"), fingerprint="f1"), "b": made(entry("b"))}).entries) == 2


def test_no_reports_are_an_error():
    with pytest.raises(EmptyData, match="at least one"):
        Report.merged({})
