"""One page that needs nothing else and shows everything, whatever the model wrote."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from conftest import asked_only

from concept_unlearn.report.table import report_examples

FETCHING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.fetched, self.text = Counter(), re.findall(r"(?:url\(|@import)\s*([^)\s]*)", source), ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.fetched += [value for name, value in attrs if name in FETCHING]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html())


def test_the_page_fetches_nothing(page):
    assert page.fetched  # the plots refer to their own parts
    assert all(where.startswith("#") for where in page.fetched)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}


def test_the_page_names_the_scope_the_model_and_every_patch(report, page):
    for expected in ("planted", "tiny", *(e.name for e in report.entries), *(e.about for e in report.entries)):
        assert expected in page.text


def test_the_page_shows_every_question_before_and_after(report, page):
    assert len(report_examples(report)) == 3
    for name, rows in report.base.probes.items():
        for before, after in zip(rows, report.main.rows.probes[name], strict=True):
            for expected in (before.prompt, before.generation.strip(), after.generation.strip()):
                assert expected in page.text
    assert page.tags["details"] == 4


def test_examples_stand_on_the_page_and_again_among_all_questions(report, page):
    for name, i in report_examples(report):
        prompt = report.base.probes[name][i].prompt
        assert page.text.count(prompt) >= 2


@pytest.mark.parametrize(
    ("entries", "plots"), [((0,), 1), ((0, 1), 3), ((1,), 2)], ids=["alone", "compared", "calibrated"]
)
def test_plots_are_inline_and_only_those_that_have_something_to_show(report, entries, plots):
    source = replace(report, entries=tuple(report.entries[i] for i in entries)).html()
    assert Page(source).tags["svg"] == plots
    assert ("Beside other patches" in source) == (len(entries) > 1)
    assert ("How the strength was found" in source) == (1 in entries)


@pytest.mark.parametrize("sets", [("in_easy",), ("in_easy", "out_far"), ("in_hard", "out_near")], ids=" ".join)
def test_a_scope_of_few_sets_is_still_a_page(report, sets):
    assert Page(asked_only(report, *sets).html()).tags["details"] == len(sets)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</pre><img src=https://a.b/c>", "a & b < c"])
def test_what_the_model_writes_is_never_taken_for_markup(report, text):
    row = report.base.probes["in_easy"][0].model_copy(update={"generation": text, "prompt": text})
    probes = report.base.probes | {"in_easy": (row, *report.base.probes["in_easy"][1:])}
    page = Page(
        replace(
            report, base=report.base.model_copy(update={"probes": probes}), provenance={"a": text}, model=text
        ).html()
    )
    assert text in page.text
    assert not page.tags.keys() & {"script", "img"}
    assert all(where.startswith("#") for where in page.fetched)
