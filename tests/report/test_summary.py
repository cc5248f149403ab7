"""The files for other programs: every number once more, and a row an example."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def saved(rich_report, tmp_path):
    rich_report.save(tmp_path)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert rows.pop() == ""
    return json.loads((tmp_path / "summary.json").read_text()), [json.loads(row) for row in rows]


def test_the_summary_tells_of_every_entry(saved, rich_report):
    summary, _ = saved
    labels = list(rich_report.labelled)
    for part in ("compared", "strength", "calibration", "cost", "about", "gaps"):
        assert list(summary[part]) == labels
    assert summary["metrics"] == summary["compared"]["sae"]
    assert (summary["patch"], summary["model"], summary["benchmark"], summary["digest"]) == (
        "sae",
        "tiny",
        "planted",
        "d1",
    )
    assert summary["provenance"]["config"]["limit"] == "Infinity"


def test_a_metric_stands_beside_the_untouched_and_the_retrained_models(saved):
    found = saved[0]["metrics"]["easy/accuracy"]
    assert (found["base"], found["patched"], found["retrained"], found["n"], found["n_total"]) == (1, 0.25, 0.5, 4, 4)
    assert found["relative"]["value"] == 0.25
    assert found["change"]["value"] == -0.75
    assert found["low"] <= found["patched"] <= found["high"]


def test_what_is_undefined_says_why_and_is_never_a_number(saved):
    found = saved[0]["metrics"]["easy/leak"]
    assert found["patched"] is None
    assert found["change"] == {"value": None, "low": None, "high": None}
    assert found["notes"] == {"undefined": "no retrained model"}


def test_infinity_is_a_word(saved, nasty):
    assert saved[0]["compared"][nasty]["text/perplexity"]["patched"] == "Infinity"


def test_gaps_are_signed_and_none_without_a_retrained_model(saved, made, entry):
    gaps = saved[0]["gaps"]
    assert gaps["sae"]["easy/accuracy"]["value"] == -0.25
    assert gaps["npo, seed 2"]["easy/accuracy"]["value"] == 0
    assert "gaps" not in made(entry()).as_json()


def test_the_worst_case_of_attacks_is_named(saved):
    attacks = saved[0]["attacks"]
    assert attacks["sae"]["worst"] == {"attack": "relearn", "leak": 0.75}
    assert attacks["sae"]["tried"]["translate"]["skipped"] == "no translator"
    assert attacks["npo, seed 1"]["tried"]["relearn"]["curve"] == [[0, 0.5], [50, 1]]
    assert saved[0]["ceiling"]["worst"] == {"attack": "clean", "leak": 1}


def test_seeds_have_mean_and_standard_deviation(saved):
    found = saved[0]["seeds"]
    assert list(found) == ["npo"]
    assert found["npo"]["easy/accuracy"] == {"mean": 0.375, "sd": pytest.approx(0.125 * 2**0.5), "n": 2}
    assert found["npo"]["easy/leak"] == {"mean": None, "sd": None, "n": 0}


def test_without_entries_the_metrics_are_the_untouched_models(made):
    summary = made().as_json()
    assert summary["patch"] is None
    assert summary["metrics"]["easy/accuracy"]["patched"] == 1


def test_there_is_a_row_for_every_example_in_order(saved, rich_report):
    rows = saved[1]
    wanted = [(name, str(i)) for name, questions in rich_report.questions.items() for i in range(len(questions))]
    assert [(row["set"], row["index"]) for row in rows] == wanted
    assert (rows[3]["prompt"], rows[3]["answers"], rows[3]["chat"]) == ("easy question 3?", ["answer 3"], True)


def test_a_row_holds_the_reply_and_the_items_own_values_of_every_model(saved, nasty):
    row = saved[1][1]
    assert row["base"] == {"reply": "base on easy 1", "accuracy": 1}
    assert row["retrained"]["accuracy"] == 1
    assert row["patched"]["sae"] == {"reply": "sae on easy 1", "accuracy": 0}
    assert row["patched"][nasty]["reply"] == nasty


def test_the_rows_mean_is_the_metric(saved):
    summary, rows = saved
    values = [row["patched"]["npo, seed 2"]["accuracy"] for row in rows if row["set"] == "easy"]
    assert sum(values) / len(values) == summary["compared"]["npo, seed 2"]["easy/accuracy"]["patched"]


def test_passages_have_values_and_no_reply(saved):
    assert saved[1][-1]["base"] == {"perplexity": 2}
