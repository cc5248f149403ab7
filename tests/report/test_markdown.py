"""The table for a paper is one Markdown table, whatever stands in it."""

from __future__ import annotations

import re


def table(report):
    """Cells of every row, split where Markdown splits them."""
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
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
