"""One page that needs nothing else and shows everything, whatever the model wrote."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

FETCHING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """What a page shows, embeds and would fetch; and whether what is opened is closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.scripts, self.ids, self.open = Counter(), "", [], [], []
        self.fetched = re.findall(r"(?:url\(|@import)\s*([^)\s]*)", source)
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for name, value in attrs if name == "id"]
        self.fetched += [value for name, value in attrs if name in FETCHING]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def page(rich_report):
    return Page(rich_report.html())


def test_the_page_fetches_nothing(page):
    assert page.fetched
    assert all(where.startswith("#") for where in page.fetched)
    assert not page.tags.keys() & {"link", "img", "iframe", "object", "embed", "base"}


def test_every_link_leads_to_a_part_of_the_page_and_everything_is_closed(page):
    assert {where[1:] for where in page.fetched} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert page.open == []


def test_the_page_names_the_benchmark_the_model_and_every_method(rich_report, page):
    for expected in (
        "planted",
        "tiny",
        *(e.name for e in rich_report.entries),
        *(e.about for e in rich_report.entries),
    ):
        assert expected in page.text


def test_the_page_shows_the_lines_the_methods_and_the_costs(page):
    for expected in ("answers right", "-25 pt", "as made", "± 18%", "2 KB", "90 s", "activations", "no translator"):
        assert expected in page.text
    assert "– privacy leak: no retrained model" in page.text


def test_the_page_holds_every_example_of_every_model(rich_report, page):
    data = page.data
    assert list(data["sets"]) == list(rich_report.questions)
    assert data["sets"]["easy"][3] == ["easy question 3?", ["answer 3"], 1]
    assert [m["label"] for m in data["methods"]] == [*rich_report.labelled, "the retrained model"]
    assert data["base"]["said"]["easy"] == [f"base on easy {i}" for i in range(4)]
    assert data["methods"][0]["values"] == {
        "easy": {"accuracy": [1, 0, 0, 0]}, "near": {"accuracy": [1, 1, 1, 1]}, "text": {"perplexity": [2, 2]},
    }  # fmt: skip


def test_the_script_finds_every_element_that_it_asks_for(page):
    wanted = re.search(r"\[((?:\"\w+\",? ?)+)\]\.map", page.scripts[1]).group(1)
    assert set(json.loads(f"[{wanted}]")) | {"data"} <= set(page.ids)


def test_there_is_a_plot_for_each_thing_that_there_is_to_see(made, entry, page):
    assert page.tags["svg"] == 3
    assert Page(made(entry()).html()).tags["svg"] == 1
    assert Page(made(entry(curve=((0.5, 1), (1, 0.9)))).html()).tags["svg"] == 2


def test_what_is_not_there_has_no_part_of_the_page(made, entry):
    page = Page(made(entry(leak=0.0)).html())
    assert not {"attacks", "cost"} & set(page.ids)
    for absent in ("worst case", "retrained", "seed"):
        assert absent not in page.text.lower()


def test_without_entries_the_page_is_of_the_untouched_model(made):
    page = Page(made().html())
    assert {"lines", "browser"} <= set(page.ids)
    assert not {"methods", "attacks", "cost"} & set(page.ids)
    assert page.data["methods"] == []


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</script><img src=https://a.b/c>",
        "<!--<script>",
        "a & b < c",
        "{{ 7 * 7 }}",
        '"><b>',
    ],
)
def test_what_the_model_writes_is_never_taken_for_markup(made, entry, text):
    said = {"easy": (text,) * 4}
    own = entry(text, said=said, about=text, curve=((0.5, 1), (1, 0.9)), attacks={})
    report = made(own, base=entry("base", easy=4, said=said), model=text, benchmark=text, provenance={text: text})
    page, plain = Page(report.html()), Page(made(entry(curve=((0.5, 1), (1, 0.9)), about="x")).html())
    assert page.tags == plain.tags
    assert page.fetched == plain.fetched
    assert text in page.text
    assert page.data["methods"][0]["said"] == {"easy": [text] * 4}
