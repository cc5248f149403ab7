"""The terminal table and the files beside it say what was observed, whatever the model wrote."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from conftest import asked_only
from rich.console import Console

from concept_unlearn.data.scope import PROBES
from concept_unlearn.report.table import report_examples


def printed(report, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(report.table())
    return console.file.getvalue()


def saying(report, text):
    """The same report, but of a base model that answers every question with ``text``."""
    probes = {
        n: tuple(r.model_copy(update={"generation": text}) for r in rows) for n, rows in report.base.probes.items()
    }
    return replace(report, base=report.base.model_copy(update={"probes": probes}))


def test_the_table_leads_with_what_was_unlearned_from_what(report):
    title = printed(report).splitlines()[0]
    assert title.strip() == "planted: unlearned from tiny by sae"


@pytest.mark.parametrize(
    ("label", "metric", "kind"),
    [
        ("answers right, questions about the concept", "in_easy/generated_accuracy", "percent"),
        ("answers right, neighbouring knowledge", "out_near/generated_accuracy", "percent"),
        ("perplexity on general text", "general/perplexity", "ratio"),
        ("general questions the patch touches", "out_far/touched", "percent"),
    ],
)
def test_a_line_shows_what_the_summary_holds(report, label, metric, kind):
    (line,) = [line for line in printed(report).splitlines() if label in line]
    parts = report.summary()[metric]
    if kind == "percent":
        want = [f"{parts[which].value:.0%}" for which in ("base", "patched") if which in parts]
    else:
        want = [f"{parts['base'].value:.3g}", f"x{parts['relative'].value:.3f}"]
    cells = line.replace(label, "").replace("│", " ").split()
    assert cells[: len(want)] == want


def test_every_patch_stands_beside_the_first_at_its_strength(report):
    lines = printed(replace(report, entries=(report.main, replace(report.entries[1], strength=0.625)))).splitlines()
    (row,) = [line for line in lines if line.replace("│", " ").split()[:1] == ["means"]]
    assert "0.625" in row
    alone = printed(replace(report, entries=report.entries[:1]))
    assert "Beside it" not in alone
    assert "means" not in alone


def test_three_questions_are_shown_before_and_after(report):
    shown = printed(report, width=300)
    picks = report_examples(report)
    assert [name for name, _ in picks] == ["in_easy", "in_easy", "out_near"]
    for name, i in picks:
        assert report.base.probes[name][i].prompt in shown
        assert report.base.probes[name][i].generation.split()[0] in shown
        assert report.main.rows.probes[name][i].generation.split()[0] in shown


def test_chat_questions_are_shown_first(report):
    rows = list(report.base.probes["in_easy"])
    rows[-1] = rows[-1].model_copy(update={"chat": True})
    probes = report.base.probes | {"in_easy": tuple(rows)}
    asked = replace(report, base=report.base.model_copy(update={"probes": probes}))
    assert report_examples(asked)[0] == ("in_easy", len(rows) - 1)


@pytest.mark.parametrize("text", ["[/INST] yes", "[bold]yes[/bold]", "\\[x]", "yes\n\n[/]"])
def test_what_the_model_writes_is_never_taken_for_markup(report, text):
    assert " ".join(text.split()) in printed(saying(report, text))


def test_a_scope_of_one_set_is_still_a_table(report):
    few = printed(asked_only(report, "in_easy"))
    assert "questions about the concept" in few
    assert "neighbouring knowledge" not in few


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("report"))


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_summary_json_is_the_report_as_data(report, saved):
    found = json.loads((saved / "summary.json").read_text(), parse_constant=refuse)
    assert found == json.loads(json.dumps(report.as_json()))
    assert (found["model"], found["scope"], found["patch"]) == ("tiny", "planted", "sae")
    assert found["metrics"] == found["compared"]["sae"]
    for per_patch in ("compared", "strength", "calibration", "cost", "about"):
        assert list(found[per_patch]) == ["sae", "means"]
    assert found["calibration"]["means"] == [[0.5, 1.25], [1.0, 0.75]]
    assert set(found["cost"]["sae"]) == {"n_bytes", "n_parameters", "latency"}
    assert found["provenance"] == report.provenance


def test_every_metric_is_numbers_with_an_interval(saved):
    for metrics in json.loads((saved / "summary.json").read_text())["compared"].values():
        assert {f"{name}/generated_accuracy" for name in PROBES} <= set(metrics)
        for parts in metrics.values():
            assert {"patched", "low", "high", "n"} <= set(parts)
            assert parts["low"] <= parts["patched"] <= parts["high"]
            for how in parts.keys() & {"relative", "change"}:
                assert set(parts[how]) == {"value", "low", "high"}


def test_rows_jsonl_has_a_line_for_every_question_and_passage(report, saved):
    lines = [json.loads(line, parse_constant=refuse) for line in (saved / "rows.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(list(report.rows())))
    assert [line["set"] for line in lines] == [
        *(name for name, rows in report.base.probes.items() for _ in rows),
        *(f"text/{name}" for name, rows in report.base.texts.items() for _ in rows),
    ]
    for line in lines:
        is_text = line["set"].startswith("text/")
        assert {
            "set",
            "index",
            "base",
            "patched",
            *(("text", "n_tokens") if is_text else ("prompt", "chat", "answers")),
        } == set(line)
        assert list(line["patched"]) == ["sae", "means"]
        for seen in (line["base"], *line["patched"].values()):
            assert set(seen) == set(line["base"])


def test_accuracy_can_be_counted_from_the_rows(saved):
    metrics = json.loads((saved / "summary.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (saved / "rows.jsonl").read_text().splitlines()]
    for name in PROBES:
        right = [line["patched"]["sae"]["generated_right"] for line in lines if line["set"] == name]
        assert metrics[f"{name}/generated_accuracy"]["patched"] == pytest.approx(sum(right) / len(right))


def test_any_script_a_model_writes_survives_the_file(report, tmp_path):
    saying(report, "Шахматы 国际象棋 ♞ \u2028 \x85").save(tmp_path)
    with (tmp_path / "rows.jsonl").open(encoding="utf-8") as file:
        first = json.loads(next(iter(file)))
    assert first["base"]["generation"] == "Шахматы 国际象棋 ♞ \u2028 \x85"
