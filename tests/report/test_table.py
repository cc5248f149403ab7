"""A report in a terminal says what was observed, whatever the model wrote and however narrow it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console


def printed(report, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(report.table())
    return console.file.getvalue()


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split()


def test_the_table_leads_with_what_was_unlearned_from_what(rich_report):
    assert printed(rich_report).splitlines()[0].strip() == "planted: unlearned from tiny by sae"


def test_a_line_is_before_after_interval_retrained_gap_and_wanted(rich_report):
    text = printed(rich_report)
    assert cells(text, "answers right") == ["100%", "25%", "0–75%", "50%", "-25", "pt", "low"]
    assert cells(text, "perplexity") == ["7.39", "×1.000", "1.000–1.000", "×1.000", "+0%", "as", "before"]
    assert "never measured" not in text


def test_methods_stand_beside_one_another(rich_report):
    text, _ = printed(rich_report, 140).split("\nCost")
    assert cells(text, "sae  ")[:6] == ["25%", "–", "100%", "×1.000", "0.5", "75%"]
    assert cells(text, "untouched")[:4] == ["100%", "–", "100%", "7.39"]
    assert cells(text, "npo (2 seeds)")[:3] == ["38%", "±", "18%"]
    assert cells(text, "seed 2")[0] == "50%"
    assert "equal retained utility" in text


def test_costs_have_only_columns_that_somebody_measured(rich_report):
    text = printed(rich_report)
    assert "made in" in text
    assert "90 s" in text
    assert "CPU time" not in text


@pytest.mark.parametrize("width", [80, 100])
def test_a_wide_table_is_cut_between_columns_and_loses_none(rich_report, width):
    text = printed(rich_report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for head in ("easy", "leak", "near", "ppl", "strength", "worst case", "gap"):
        assert head in text


def test_examples_are_shown_before_and_after(rich_report):
    text = printed(rich_report, 140)
    for expected in ("easy question 3?", "base on easy 3", "sae on easy 3", "near question 3?", "sae on near 3"):
        assert expected in text


def test_without_attacks_seeds_and_a_retrained_model_there_is_no_word_of_them(made, entry):
    text = printed(made(entry()))
    for absent in ("worst case", "retrained", "gap", "seed", "as made", "Cost", "equal retained utility"):
        assert absent not in text


def test_without_entries_the_untouched_model_is_told_of(made):
    text = printed(made())
    assert text.splitlines()[0].strip() == "planted: tiny"
    assert cells(text, "answers right") == ["100%", "100–100%", "low"]
    assert "after" not in text


@pytest.mark.parametrize("text", ["[/INST] yes", "[bold]yes[/bold]", "\\[x]", "yes\n\n[/]"])
def test_what_the_model_writes_is_never_taken_for_markup(made, entry, text):
    said = {"easy": (text,) * 4}
    report = made(entry(text, said=said, about=text), base=entry("base", easy=4, said=said), model=text)
    assert printed(report, 200).count(" ".join(text.split())) >= 4


def test_what_the_model_writes_does_not_steer_the_terminal(made, entry):
    said = {"easy": ("\x1b[2J\x07gone",) * 4}
    report = made(entry(said=said), base=entry("base", easy=4, said=said))
    assert not set(printed(report)) & {"\x1b", "\x07"}
    assert "�[2J" in printed(report)
