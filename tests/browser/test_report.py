"""The page of a report in a browser: filtered, read to the end, whole on a phone."""

from __future__ import annotations

import pytest
from report.conftest import NASTY, make_entry, make_report, make_rich

from concept_unlearn.report import Question

N = 60


@pytest.fixture
def open_(page, tmp_path):
    def open_(report):
        (tmp_path / "report.html").write_text(report.html())
        page.goto((tmp_path / "report.html").as_uri())
        return page

    return open_


def long_report():
    """Sixty questions, of which the last word changes in every third reply."""
    questions = {"easy": tuple(Question(prompt=f"question {i}?", answers=(f"answer {i}",)) for i in range(N))}
    was = tuple(f"it is {i}" for i in range(N))
    now = tuple(f"it is {i if i % 3 else 'not known'}" for i in range(N))
    results = {name: value for name, value in make_entry().results.items() if name.startswith("text")}
    base, own = (make_entry(said={"easy": said}, results=results) for said in (was, now))
    return make_report(own, base=base, questions=questions)


def test_every_part_that_is_named_can_be_reached(open_):
    page = open_(make_rich())
    links = page.get_by_role("navigation").get_by_role("link")
    assert links.count() == 6
    for link in links.all():
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert target.is_visible()
        assert -1 < target.bounding_box()["y"] < page.viewport_size["height"]


def test_a_set_is_chosen_searched_and_narrowed_to_what_changed(open_):
    page = open_(long_report())
    count = page.locator("#count")
    assert count.inner_text() == f"{N} of {N} examples"
    page.get_by_label("changed").check()
    assert count.inner_text() == f"{N // 3} of {N} examples"
    assert page.locator("#examples > li").count() == N // 3
    assert page.locator("#examples .changed").count() == N // 3
    page.get_by_label("search").fill("QUESTION 3")
    assert count.inner_text() == f"5 of {N} examples"  # 3, 30, 33, 36, 39
    page.get_by_label("search").fill("no such word")
    assert count.inner_text() == f"0 of {N} examples"


def test_more_is_shown_until_all_is_and_the_keyboard_stays_where_it_was(open_):
    page = open_(long_report())
    shown = page.locator("#examples > li")
    assert shown.count() == 25
    page.get_by_role("button", name="Show more").click()
    assert shown.count() == 50
    assert page.evaluate("[...document.querySelectorAll('#examples > li')].indexOf(document.activeElement)") == 25
    page.get_by_role("button", name="Show more").click()
    assert shown.count() == N
    assert not page.get_by_role("button", name="Show more").is_visible()


def test_another_method_and_another_set_show_their_replies(open_):
    page = open_(make_rich())
    options = page.get_by_label("after").locator("option").all_inner_texts()
    for method, said in (("sae", "sae on near 1"), ("npo", "npo on near 1")):
        page.get_by_label("after").select_option(next(o for o in options if o.startswith(method)))
        page.get_by_label("set").select_option("near")
        assert said in page.locator("#examples").inner_text()
        assert "base on near 1" in page.locator("#examples").inner_text()


def test_markup_in_names_and_replies_is_shown_as_it_is(open_):
    page = open_(make_rich())
    options = page.get_by_label("after").locator("option").all_inner_texts()
    nasty = next(o for o in options if "</script>" in o)
    page.get_by_label("after").select_option(nasty)
    assert "</script><b>[red]a|b[/red]</b>" in page.locator("#examples").inner_text()
    assert page.locator("#examples b").count() == 0
    page.locator("summary").click()
    assert NASTY.split()[0] in page.locator("details").inner_text()


@pytest.mark.parametrize("page", [320, 390, 768, 1280], indirect=True)
def test_it_fits_its_window(open_, overflow):
    page = open_(make_rich())
    assert overflow(page) <= 0
    page.locator("summary").click()
    assert overflow(page) <= 0


def test_nothing_shown_is_no_number(open_):
    text = open_(make_rich()).locator("body").inner_text()
    for odd in ("NaN", "undefined", "null", "[object"):
        assert odd not in text


def test_a_report_without_methods_is_read_too(open_):
    page = open_(make_report())
    assert page.locator("#examples > li").count() == 4
    assert not page.get_by_label("after").is_visible()


def test_a_page_that_lost_its_data_says_so(page, tmp_path):
    whole = make_rich().html()
    begin = whole.index('id="data">') + len('id="data">')
    (tmp_path / "cut.html").write_text(whole[:begin] + "{" + whole[whole.index("</script>", begin) :])
    page.goto((tmp_path / "cut.html").as_uri())
    assert "has lost its examples" in page.locator("#count").inner_text()
    assert not page.get_by_role("button", name="Show more").is_visible()
