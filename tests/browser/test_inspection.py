"""The page of an inspection in a browser: found, decided, saved, and the choice edits what was chosen."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import PLANTED, make_perfect_sae
from test_cli import shell

from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.evaluation.alone import effect_alone
from concept_unlearn.features import Choice, inspect_features
from concept_unlearn.patches import FeaturePatch

EVEN, ODD = PLANTED
FEATURES = (EVEN, ODD, 20, 7)
NASTY = "</script><img src=x onerror=alert(1)> & «шахматы»"


@pytest.fixture(scope="module")
def seen(planted):
    return inspect_features(planted.lm, load_dictionary(planted.first), planted.scope, FEATURES, contexts=3)


@pytest.fixture
def open_(page, tmp_path):
    def open_(seen, choice=None):
        page.goto((seen.save(tmp_path / "seen", choice) / "inspection.html").as_uri())
        return page

    return open_


def listed(page):
    return [int(text) for text in page.locator("#list b").all_inner_texts()]


def current(page):
    return int(re.search(r"\d+", page.locator("main h2").inner_text())[0])


def saved(page, path):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save choice.yaml").click()
    assert download.value.suggested_filename == "choice.yaml"
    download.value.save_as(path)
    return Choice.load(path)


def test_search_finds_numbers_tokens_and_labels(open_, seen):
    page = open_(seen.labelled({20: "names of rooks"}, by="somebody"))
    assert listed(page) == list(FEATURES)
    page.get_by_role("searchbox").fill("NAMES rooks")
    assert listed(page) == [20]
    assert page.locator("#list .top").inner_text() == "names of rooks"
    assert "says somebody" in page.locator("main .label").inner_text()
    page.get_by_role("searchbox").fill("20")
    assert 20 in listed(page)
    page.get_by_role("searchbox").fill("no such word")
    assert listed(page) == []
    assert page.locator("#count").inner_text() == f"0 of {len(FEATURES)} features"
    token = seen.of(EVEN).forget.contexts[0].tokens[seen.of(EVEN).forget.contexts[0].peak].strip()
    page.get_by_role("searchbox").fill(token)
    assert EVEN in listed(page)


def test_the_keyboard_goes_through_decides_and_does_not_type_into_the_search(open_, seen):
    page = open_(seen)
    assert current(page) == FEATURES[0]
    for key in ("y", "j", "p", "j", "n", "j", "j"):
        page.keyboard.press(key)
    assert current(page) == FEATURES[3]
    page.keyboard.press("k")
    assert current(page) == FEATURES[2]
    assert page.locator("#tally").inner_text() == "1 kept, 1 dropped, 1 pinned"
    page.keyboard.press("u")
    assert page.locator("#tally").inner_text() == "1 kept, 0 dropped, 1 pinned"
    page.keyboard.press("/")
    page.keyboard.type("y")
    assert page.get_by_role("searchbox").input_value() == "y"
    assert page.locator("#tally").inner_text() == "1 kept, 0 dropped, 1 pinned"
    page.keyboard.press("Escape")
    assert not page.evaluate("document.activeElement.id === 'search'")


def test_what_is_pinned_here_is_what_a_patch_edits(open_, seen, planted, tmp_path):
    page = open_(seen, Choice(drop=(7,)))
    page.get_by_role("button", name="Keep", exact=True).click()
    page.locator(f"#list [data-feature='{ODD}']").click()
    page.get_by_role("button", name="Pin", exact=True).click()
    choice = saved(page, tmp_path / "choice.yaml")
    assert choice == Choice(keep=(EVEN,), drop=(7,), pinned=(ODD,), dictionary=seen.dictionary)
    dictionary = load_dictionary(planted.first)
    assert FeaturePatch(dictionary=dictionary, features=choice.of(dictionary)).slices[0].features == (ODD, EVEN)


def test_the_unlearn_verb_takes_what_the_page_saves(page, workplace, tmp_path):
    common = ("--model", workplace / "model", "--scope", workplace / "scope", "--dictionary", workplace / "dictionary")
    shell("inspect", *common, "--features", "3, 17", "--output", tmp_path / "look", "--contexts", 2)
    page.goto((tmp_path / "look" / "inspection.html").as_uri())
    page.keyboard.press("p")
    saved(page, tmp_path / "choice.yaml")
    shell("unlearn", *common, "--choice", tmp_path / "choice.yaml", "--n", 1, "--grid", 2, "--keep", 0.5,
          "--output", tmp_path / "patch")  # fmt: skip
    made = json.loads((tmp_path / "patch" / "config.json").read_text())["made"]["method"]
    assert made["choices"][0]["pinned"] == [3]


def test_decisions_outlive_a_reload_and_a_new_beginning_forgets_them(open_, seen):
    page = open_(seen)
    page.keyboard.press("y")
    page.reload()
    assert page.locator("#tally").inner_text() == "1 kept, 0 dropped, 0 pinned"
    open_(seen, Choice(drop=(ODD,)))
    assert page.locator("#tally").inner_text() == "0 kept, 1 dropped, 0 pinned"


def test_only_what_was_decided_can_be_shown_and_sorted(open_, seen):
    page = open_(seen, Choice(keep=(ODD,), drop=(20,)))
    for what, found in (("keep", [ODD]), ("drop", [20]), ("pinned", []), ("open", [EVEN, 7]), ("", list(FEATURES))):
        page.get_by_label("Which features").select_option(what)
        assert listed(page) == found
    page.get_by_label("Order").select_option("forget")
    rate = {s.feature: s.forget.rate.value for s in seen.features}
    assert [rate[i] for i in listed(page)] == sorted(rate.values(), reverse=True)


def test_effects_are_shown_and_sorted_by_where_they_were_measured(open_, seen, planted):
    plain = open_(seen)
    assert plain.locator("#order option:not([hidden])").count() == 4
    dictionary = load_dictionary(planted.first)
    effects = effect_alone(planted.lm, dictionary, planted.scope, FEATURES, edit=Clamp(to=-30.0), n=12)
    page = open_(seen.beside(effects))
    text, change = page.locator("main").inner_text(), effects[EVEN].forget
    assert "Suppressed alone: clamp to -30" in text
    assert f"It touches {change.touched} of {change.questions} questions of the concept" in text
    page.get_by_label("Order").select_option("lost")
    assert [effects[i].forget.logprob for i in listed(page)] == sorted(e.forget.logprob for e in effects.values())


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0"), (1, "100%"), (0.995, "99.5%"), (0.1, "10%"), (0.0312, "3.1%"), (2e-5, "2e-3%")]
)
def test_a_share_is_written_as_people_write_it(open_, seen, share, shown):
    page = open_(seen)
    assert page.evaluate(f"percent({share})") == shown


def test_a_feature_leads_to_neuronpedia_only_where_it_is_there(open_, seen):
    assert open_(seen).locator("main a").count() == 0
    page = open_(seen.model_copy(update={"neuronpedia_id": "gemma-2-2b/20-gemmascope-res-16k"}))
    link = page.get_by_role("link", name="on Neuronpedia")
    assert link.get_attribute("href") == f"https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/{FEATURES[0]}"
    assert link.get_attribute("rel") == "noopener noreferrer"


def test_markup_in_texts_labels_and_names_is_shown_as_it_is(open_, seen):
    shown = seen.features[0]
    context = shown.forget.contexts[0].model_copy(update={"tokens": (NASTY,), "acts": (1.0,), "peak": 0})
    side = shown.forget.model_copy(update={"contexts": (context,)})
    shown = shown.model_copy(update={"forget": side, "label": NASTY})
    page = open_(seen.model_copy(update={"features": (shown,), "scope": NASTY, "labeller": NASTY}))
    assert page.locator("img").count() == 0
    assert NASTY in page.locator("main").inner_text()
    assert NASTY in page.locator("h1").inner_text()


def test_a_feature_that_never_fires_is_said_to_and_nothing_is_not_a_number(open_, planted):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.b_enc[2] = -1e6
        sae.W_dec[4] = 0
    dictionary = SAEDictionary(sae)
    seen = inspect_features(planted.lm, dictionary, planted.scope, [2, 4])
    page = open_(seen.beside(effect_alone(planted.lm, dictionary, planted.scope, [2, 4], n=4)))
    assert "It never fires on this scope" in page.locator("main").inner_text()
    for _ in range(2):
        assert "NaN" not in page.locator("body").inner_text()
        assert "undefined" not in page.locator("body").inner_text()
        page.keyboard.press("j")
    assert "it writes nothing" in page.locator("main").inner_text()


@pytest.mark.parametrize("kept", ["", "{", "null", "{}", '{"features": []}'])
def test_a_page_that_lost_its_data_says_so(page, seen, tmp_path, kept):
    whole = seen.html()
    begin = whole.index('id="data">') + len('id="data">')
    (tmp_path / "cut.html").write_text(whole[:begin] + kept + whole[whole.index("</script>", begin) :])
    page.goto((tmp_path / "cut.html").as_uri())
    assert "has lost what it should show" in page.locator("main").inner_text()
    page.keyboard.press("j")
    assert page.get_by_role("button", name="Save choice.yaml").is_disabled()


@pytest.mark.parametrize("page", [320, 390, 768, 1280], indirect=True)
def test_it_fits_its_window(open_, seen, planted, overflow):
    effects = effect_alone(planted.lm, load_dictionary(planted.first), planted.scope, [EVEN], n=4)
    long = seen.beside(effects).labelled({EVEN: "x" * 120}, by="a-model-with-a-long-name/" * 3)
    page = open_(long.model_copy(update={"neuronpedia_id": "gemma-2-2b/20-gemmascope-res-16k"}))
    assert overflow(page) <= 0
