"""The table for a paper is one Markdown table, whatever stands in it."""

from __future__ import annotations

import re


def table(report, number=0):
    """Cells of every row of a table, split where Markdown splits them."""
    tables = [part.splitlines() for part in report.markdown().split("\n\n") if part.startswith("|")]
    lines = tables[number]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_golden_cells(rich_report):
    head, rule, *rows = table(rich_report)
    assert head == ["method", "easy", "leak", "near", "ppl", "strength", "worst case", "gap to retrained"]
    assert rule == ["---", *["---:"] * 7]
    assert rows[0] == [
        "untouched",
        "100% [100–100%]",
        "–",
        "100% [100–100%]",
        "7.39 [7.39–7.39]",
        "–",
        "100% (clean)",
        "+50 pt",
    ]
    assert [row[0] for row in rows[1:5]] == ["retrained", "sae", "sae, as made", "npo (2 seeds)"]
    assert rows[2] == [
        "sae",
        "25% [0–75%]",
        "–",
        "100% [100–100%]",
        "×1.000 [1.000–1.000]",
        "0.5",
        "75% (relearn)",
        "-25 pt",
    ]
    assert rows[3][1] == "0% [0–0%]"
    assert rows[4][1] == "38% ± 18%"


def test_what_was_measured_of_costs_is_a_table_of_its_own(rich_report):
    head, _, *rows = table(rich_report, 1)
    assert head == ["cost", "size", "numbers", "forward pass", "made in", "needs"]
    assert rows == [["sae", "2 KB", "512", "×1.500", "90 s", "activations"]]


def test_pipes_tags_and_emphasis_are_escaped(rich_report):
    rows = table(rich_report)
    assert {len(row) for row in rows} == {8}
    assert rows[-1][0] == r"\</script>\<b>\[red\]a\|b\[/red\]\</b> Шахматы"


def test_a_backslash_does_not_undo_an_escape(made, entry):
    assert r"a\\\|b" in made(entry("a\\|b")).markdown()


def test_columns_that_nobody_filled_are_not_there(made, entry):
    head, _, untouched, only = table(made(entry()))
    assert head == ["method", "easy", "leak", "near", "ppl", "strength"]
    assert (untouched[0], only[0]) == ("untouched", "sae")
    assert len(table(made())) == 3
