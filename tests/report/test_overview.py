"""The overview: a row a method, three columns a setting, the numbers of the reports themselves."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from concept_unlearn.errors import InvalidConfig
from concept_unlearn.report import Overview


def test_it_says_of_each_method_what_its_reports_say(rich_report, made, entry, nasty):
    plain = made(entry("sae", easy=0, near=3), entry("npo", easy=2))
    overview = Overview({"one": rich_report, "two": plain})
    assert overview.rows["untouched"] == ("100%", "100%", "100%", "100%", "100%", "–")
    assert overview.rows["retrained"] == ("50%", "100%", "–", "–", "–", "–")
    assert overview.rows["sae"] == ("25%", "100%", "75%", "0%", "75%", "–")
    assert overview.rows["npo"] == ("38% ± 18%", "100% ± 0%", "100% ± 0%", "50%", "100%", "–")
    assert list(overview.rows) == ["untouched", "retrained", "sae", "npo", nasty]


def test_it_is_a_table_in_a_terminal_and_in_markdown(rich_report, tmp_path):
    overview = Overview({"a|b": rich_report})
    console = Console(file=io.StringIO(), width=100)
    console.print(overview.table())
    assert "sae" in console.file.getvalue()
    lines = overview.save(tmp_path / "deep").read_text().splitlines()
    assert lines[0] == r"| method | a\|b: left | a\|b: kept | a\|b: worst |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[4] == "| sae | 25% | 100% | 75% |"
    assert "left is answers right, kept is neighbours right" in lines[-1]


def test_of_nothing_is_refused():
    with pytest.raises(InvalidConfig, match="at least one report"):
        Overview({})
