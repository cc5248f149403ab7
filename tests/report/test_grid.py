"""The table of methods, cell by cell, as the terminal, the page and the paper all show it."""

from __future__ import annotations

import math

import pytest

from concept_unlearn.report.grid import columns, grid
from concept_unlearn.report.reading import examples, told


def named(report):
    return {row.name: row for row in grid(report)}


def test_columns_are_the_lines_with_a_short_name_that_were_measured(rich_report):
    assert [line.column for line in columns(rich_report)] == ["easy", "leak", "near", "ppl"]


def test_a_benchmark_without_short_names_shows_what_is_left_and_what_is_kept(made, entry):
    assert [line.metric for line in columns(made(entry(), lines=()))] == ["easy/accuracy", "near/accuracy"]


def test_rows_are_the_models_the_methods_and_beneath_them_how_they_were_made_and_their_seeds(rich_report, nasty):
    assert [row.name for row in grid(rich_report)] == [
        "untouched", "retrained", "sae", "sae, as made", "npo (2 seeds)", "npo, seed 1", "npo, seed 2", nasty,
    ]  # fmt: skip
    assert [row.mark for row in grid(rich_report)] == [None, None, 0, 0, 1, 1, 1, 2]


def test_cells_hold_the_calibrated_and_the_made_patch(rich_report):
    rows = named(rich_report)
    assert [cell.value for cell in rows["untouched"].cells] == ["100%", "–", "100%", "7.39"]
    assert [cell.value for cell in rows["sae"].cells] == ["25%", "–", "100%", "×1.000"]
    assert [cell.value for cell in rows["sae, as made"].cells] == ["0%", "–", "50%", "×1.000"]
    assert (rows["sae"].strength.value, rows["sae, as made"].strength.value) == ("0.5", "1")


def test_an_empty_cell_says_why(rich_report):
    assert named(rich_report)["sae"].cells[1].why == "no retrained model"


def test_a_factor_is_of_the_untouched_models_value(made, entry):
    (cell,) = named(made(entry("worse", nll=2.0 + math.log(1.5))))["worse"].cells[3:]
    assert cell.value == "×1.500"
    assert cell.beside == "1.500–1.500"


def test_worst_cases_name_the_attack(rich_report):
    rows = named(rich_report)
    assert (rows["sae"].worst.value, rows["sae"].worst.beside) == ("75%", "relearn")
    assert (rows["untouched"].worst.value, rows["untouched"].worst.beside) == ("100%", "clean")
    assert rows["sae, as made"].worst.why == rows["retrained"].worst.why == "not attacked"


def test_gaps_are_to_the_retrained_model(rich_report):
    rows = named(rich_report)
    assert rows["sae"].gap.value == "-25 pt"
    assert rows["untouched"].gap.value == "+50 pt"
    assert rows["retrained"].gap.value == "+0 pt"


def test_seeds_are_mean_and_standard_deviation(rich_report):
    row = named(rich_report)["npo (2 seeds)"]
    assert row.cells[0].text == "38% ± 18%"
    assert row.cells[1].text == "–"
    assert row.worst.text == "100% ± 0%"
    assert row.worst.beside == "relearn"
    assert row.gap.value == "-12.5 pt"


def test_lines_are_before_after_retrained_and_gap(rich_report):
    lines = {row.line.label: row for row in told(rich_report)}
    assert list(lines) == ["answers right", "privacy leak", "neighbours right", "perplexity"]
    line = lines["answers right"]
    assert (line.before.text, line.after.text, line.retrained.text, line.gap) == ("100%", "25%", "50%", "-25 pt")
    assert (lines["perplexity"].before.text, lines["perplexity"].after.text) == ("7.39", "×1.000")


def test_examples_are_of_what_is_forgotten_and_one_of_what_is_kept_messages_first(rich_report):
    assert examples(rich_report) == [("easy", 3), ("easy", 0), ("near", 3)]


@pytest.mark.parametrize(("keeps", "wanted"), [("all/utility", ("near", 3)), ("easy/accuracy", ("easy", 1))])
def test_examples_do_not_need_a_kept_set(made, entry, keeps, wanted):
    assert examples(made(entry(), keeps=keeps))[-1] == wanted


def test_without_replies_there_are_no_examples(made, entry):
    assert examples(made(entry(said={}))) == []
