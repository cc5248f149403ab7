"""Numbers as a reader wants them."""

from __future__ import annotations

import pytest

from concept_unlearn.report import words


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", None, "–"), ("percent", 0.0, "0%"), ("percent", 0.035, "3.5%"), ("percent", 0.0994, "9.9%"),
        ("percent", 0.0996, "10%"), ("percent", 0.125, "12%"), ("percent", 1.0, "100%"),
        ("number", 1.86e-23, "1.86e-23"),
        ("number", -40.0, "-40"), ("number", float("inf"), "∞"), ("number", float("-inf"), "-∞"),
        ("factor", 1.0034, "×1.003"), ("factor", 12345.0, "×1.23e+04"), ("factor", float("inf"), "∞"),
    ],
)  # fmt: skip
def test_a_value_is_shown_by_its_kind(kind, value, text):
    assert words.shown(kind, value) == text


@pytest.mark.parametrize(
    ("kind", "low", "high", "text"),
    [
        ("percent", 0.02, 0.31, "2–31%"), ("number", 0.1, 0.25, "0.1–0.25"), ("number", -40.0, -2.0, "-40 to -2"),
        ("factor", 0.9, 1.25, "0.900–1.250"), ("percent", None, 0.3, ""),
    ],
)  # fmt: skip
def test_an_interval_is_two_values_and_no_riddle_of_dashes(kind, low, high, text):
    assert words.interval(kind, low, high) == text


@pytest.mark.parametrize(
    ("kind", "difference", "text"),
    [
        ("percent", 0.0349, "+3.5 pt"), ("percent", -1.0, "-100 pt"), ("percent", 0.0, "+0 pt"),
        ("factor", -0.066, "-6.6%"),
        ("number", 0.0241, "+0.024"), ("number", None, "–"), ("factor", float("inf"), "∞"),
    ],
)  # fmt: skip
def test_a_gap_has_its_sign(kind, difference, text):
    assert words.gap(kind, difference) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (words.size(512), "512 B"), (words.size(1023), "0.999 KB"), (words.size(1.5 * 2**20), "1.5 MB"),
        (words.size(2**40), "1.02e+03 GB"), (words.count(999), "999"), (words.count(999.6), "1 k"),
        (words.count(1234567), "1.23 M"), (words.seconds(0.5), "0.5 s"), (words.seconds(90), "90 s"),
        (words.seconds(600), "10 min"), (words.seconds(9000), "2.5 h"),
    ],
)  # fmt: skip
def test_amounts_have_the_unit_that_suits_them(found, text):
    assert found == text
