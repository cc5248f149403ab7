"""The picture of a report stands alone: one well-formed SVG with its own paper, both of its looks, and every name."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from concept_unlearn.evaluation.measured import Measured
from concept_unlearn.report import plots
from concept_unlearn.report.drawing import COLOURS, DARK, PAPER

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parents[2]


def texts(drawing):
    return [element.text for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_it_is_the_tradeoff_of_the_report_above_the_name_of_every_method(rich_report):
    drawing = rich_report.picture()
    inner = plots.tradeoff(rich_report)
    assert inner[inner.index(">") :] in drawing
    said = texts(drawing)
    assert said[0] == "planted, unlearned from tiny"
    assert said[-6:-2] == ["1", "sae", "2", "npo"]
    assert said[-2:] == ["3", "</script><b>[red]a|b[/red]…"]


def test_it_has_its_own_paper_and_is_dark_where_the_reader_is(rich_report):
    drawing = rich_report.picture()
    style = ElementTree.fromstring(drawing).find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    assert f"--paper:{PAPER};" in light
    assert f"--paper:{DARK[1]};" in dark
    assert light.count("--s") == dark.count("--s") == len(COLOURS) == len(DARK[2])
    assert re.search(r'<rect width="464" height="[\d.]+" rx="8" style="fill:var\(--paper\)"/>', drawing)


def test_it_needs_nothing_from_elsewhere(rich_report):
    drawing = rich_report.picture().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|url\(|<script|<image|href", drawing)


def test_the_dark_colours_are_those_of_the_page():
    page = (ROOT / "concept_unlearn" / "report" / "report.css").read_text()
    dark = page[page.index("prefers-color-scheme: dark") :]
    for i, shade in enumerate(DARK[2]):
        assert f"--s{i}: {shade};" in dark
    assert f"--ink: {DARK[0]};" in dark
    assert f"--paper: {DARK[1]};" in dark


def test_more_methods_make_it_taller_and_none_is_left_out(made, entry):
    few, many = made(entry("a"), entry("b")), made(*(entry(f"method {i}") for i in range(9)))
    heights = [float(ElementTree.fromstring(r.picture()).get("height")) for r in (few, many)]
    assert heights[1] - heights[0] == pytest.approx(4 * 19)
    assert {f"method {i}" for i in range(9)} <= set(texts(many.picture()))


def test_without_a_method_that_has_both_numbers_there_is_none_and_no_file(made, entry, tmp_path):
    gone = entry("gone", results={"easy/accuracy": Measured(value=None), "near/accuracy": Measured(value=1.0)})
    for report in (made(), made(gone)):
        assert report.picture() is None
        assert not (report.save(tmp_path) / "tradeoff.svg").exists()


def test_it_lies_beside_the_report(rich_report, tmp_path):
    assert (rich_report.save(tmp_path) / "tradeoff.svg").read_text() == rich_report.picture()


def test_the_picture_of_the_readme_is_one_of_these():
    found = ElementTree.parse(ROOT / "docs" / "pictures" / "quickstart.svg").getroot()
    assert found.get("aria-label") == "harry_potter, unlearned from SmolLM2-135M-Instruct"
    assert found.find(f"{SVG}rect").get("style") == "fill:var(--paper)"
