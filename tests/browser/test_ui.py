"""The live page in a real browser, on a tiny model."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from conftest import CONCEPT, FAR, PLANTED, n_hooks, words

from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.gates import TokenGate
from concept_unlearn.lm.fingerprint import fingerprint
from concept_unlearn.patches import FeaturePatch, Stack, WeightPatch
from concept_unlearn.ui import Stage, address_of, listen, make_server
from concept_unlearn.weights.delta import Dense

pytest.importorskip("nicegui", reason="no nicegui: pip install 'concept-unlearn[ui]'")
ASKED = words(*CONCEPT[3:6], FAR[1])
LONG = 200


@pytest.fixture(scope="module")
def live(planted, tmp_path_factory):
    """The page, served from a thread of this process: its address and its stage."""
    runs = tmp_path_factory.mktemp("runs")
    for name, title in (("one", "What was measured"), ("lr=1% #2?", "Another rate")):
        (runs / name).mkdir()
        (runs / name / "report.html").write_text(f"<!doctype html><title>{name}</title><h1>{title}</h1>")
    feature = FeaturePatch(
        dictionary=load_dictionary(planted.first), features=PLANTED, edit=Clamp(to=-3.0), gate=TokenGate(above=0.5)
    )
    name, weight = next(iter(planted.lm.model.named_parameters()))
    weights = WeightPatch(deltas={name: Dense(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))})
    two = Stack(tuple(
        FeaturePatch(
            dictionary=load_dictionary(planted.first), features=[i], edit=Clamp(to=-3.0), gate=TokenGate(above=0.5)
        )
        for i in PLANTED
    ))  # fmt: skip
    patches = {"planted": feature, "weights": weights, "two": two}
    stage, taken = Stage(planted.lm, patches), listen("127.0.0.1", 0)
    server = make_server(stage, runs)
    thread = threading.Thread(target=lambda: server.run(sockets=[taken]))
    thread.start()
    yield address_of(taken), stage
    server.should_exit = True
    thread.join(20)
    stage.close()
    assert not thread.is_alive()


@pytest.fixture
def chat(live, page):
    page.goto(live[0])
    page.get_by_label("Longest reply").fill("12")
    return page


class Slow:
    """Each pass of the model takes a while, or waits for an event, until the block ends."""

    def __init__(self, stage, until=None):
        self.passes, self.until = 0, until
        self._handle = stage.lm.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.passes += 1
        time.sleep(0.05)
        assert self.until is None or self.until.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.until is not None:
            self.until.set()
        self._handle.remove()


def ask(page, message=ASKED, wait=True):
    page.get_by_label("Message").fill(message)
    page.get_by_role("button", name="Ask").click()
    if wait:
        idle(page)


def idle(page):
    """Asked, and answered."""
    page.wait_for_function("document.querySelector('.side.patched .reply').innerText.trim() != ''")
    page.wait_for_function("!document.querySelector('.caret')")
    page.locator("button:has-text('Ask'):not([disabled])").wait_for()


def reply(page, side):
    return page.locator(f".{side} .reply").inner_text().strip()


def slide(page, name, to):
    """To a place between 0, its lower end, and 1."""
    box = page.locator(f".q-slider[aria-label='{name}'], .q-slider:has([aria-label='{name}'])").first.bounding_box()
    page.mouse.click(box["x"] + to * box["width"], box["y"] + box["height"] / 2)


def same_on_both_sides(page):
    page.wait_for_function(
        """[...document.querySelectorAll('.next tbody tr')].every(
             row => row.children[1].innerText.trim() == row.children[2].innerText.trim())"""
    )


def test_both_replies_stand_side_by_side_and_what_fired_is_marked(live, chat):
    lm, patch = live[1].lm, live[1].patches["planted"]
    ask(chat)
    assert reply(chat, "original") == lm.generate(ASKED, max_new_tokens=12)[0].strip()
    with patch.on(lm):
        assert reply(chat, "patched") == lm.generate(ASKED, max_new_tokens=12)[0].strip()
    assert [mark.inner_text().strip() for mark in chat.locator(".prompt .lit").all()] == ASKED.split()[:3]
    chat.locator(".prompt .lit").first.press("Enter")
    chat.locator(".chosen-token >> text=gate open").wait_for()
    assert chat.locator(".chosen-token li b").first.inner_text()
    chat.locator(".original .reply [data-token]").first.click()
    chat.locator(".chosen-token >> text=it could have said").wait_for()


def test_strength_0_makes_both_sides_one(chat):
    ask(chat)
    assert reply(chat, "original") != reply(chat, "patched")
    slide(chat, "Strength", 0)
    same_on_both_sides(chat)  # at once, without asking again
    chat.get_by_text("made before the knobs were turned").wait_for()
    ask(chat)
    assert reply(chat, "original") == reply(chat, "patched")
    chat.get_by_role("button", name="As made").click()
    chat.get_by_text("made before the knobs were turned").wait_for()
    ask(chat)
    assert reply(chat, "original") != reply(chat, "patched")


def test_a_gate_that_is_shut_lets_nothing_through(chat):
    ask(chat)
    chat.get_by_text("open: let through").wait_for()
    slide(chat, "token gate opens above", 0.98)
    chat.get_by_text("closed: let through 0").wait_for()
    assert chat.locator(".prompt .lit.closed").count() == 3
    ask(chat)
    assert reply(chat, "original") == reply(chat, "patched")


def test_features_are_switched_off_one_by_one(chat):
    ask(chat)
    marked = chat.locator(".prompt .lit")
    assert marked.count() == 3
    chat.get_by_role("checkbox", name=f"{PLANTED[0]} ·").click()
    chat.wait_for_function("document.querySelectorAll('.prompt .lit').length < 3")
    assert marked.count() >= 1
    chat.get_by_role("button", name="None").click()
    chat.wait_for_function("document.querySelectorAll('.prompt .lit').length == 0")
    same_on_both_sides(chat)


def test_a_patch_without_a_gate_says_so(chat):
    chat.get_by_label("Patch", exact=True).click()
    chat.get_by_role("option", name="weights").click()
    chat.get_by_text("No gate: every text meets the changed weights.").wait_for()
    assert chat.get_by_role("slider").count() == 1
    ask(chat)
    assert reply(chat, "original") != reply(chat, "patched")


def test_a_part_that_is_off_is_not_told_what_another_ones_gate_read(chat):
    chat.get_by_label("Patch", exact=True).click()
    chat.get_by_role("option", name="two").click()
    ask(chat)
    chat.wait_for_function("document.querySelector('.gate-read').innerText.startsWith('open')")
    chat.get_by_role("checkbox", name=f"{PLANTED[0]} ·").click()
    chat.wait_for_function("document.querySelector('.gate-read').innerText.startsWith('Not asked')")
    assert chat.locator(".gate-read").nth(1).inner_text().startswith("open: let through")


def test_a_prompt_that_is_still_being_read_anew_is_not_taken_for_the_next_one(live, chat):
    ask(chat)
    with Slow(live[1], until=threading.Event()) as slow:
        slide(chat, "Strength", 0)
        chat.get_by_text("made before the knobs were turned").wait_for()
        ask(chat, words(FAR[2], CONCEPT[6]), wait=False)
        chat.get_by_text("waiting").first.wait_for()
        slow.until.set()
        idle(chat)
    assert chat.locator(".prompt").inner_text().split()[-4:-2] == words(FAR[2], CONCEPT[6]).split()


def test_a_prompt_that_cannot_be_read_anew_is_told_and_the_page_goes_on(live, chat):
    def fail(*_):
        raise ValueError("no such device")

    ask(chat)
    handle = live[1].lm.model.register_forward_pre_hook(fail)
    slide(chat, "Strength", 0)
    chat.get_by_role("alert").get_by_text("no such device").wait_for()
    handle.remove()
    ask(chat)
    assert not chat.get_by_role("alert").is_visible()
    same_on_both_sides(chat)


def test_stop_stops(live, chat):
    before = fingerprint(live[1].lm.model)
    chat.get_by_label("Longest reply").fill(str(LONG))
    with Slow(live[1]) as slow:
        ask(chat, wait=False)
        chat.locator(".original .caret").wait_for()
        chat.get_by_role("button", name="Stop").click()
        chat.locator("button:has-text('Ask'):not([disabled])").wait_for()
    assert slow.passes < LONG
    assert chat.locator(".state").all_inner_texts() == ["stopped", "stopped"]
    assert fingerprint(live[1].lm.model) == before
    chat.get_by_label("Longest reply").fill("12")
    ask(chat)
    assert reply(chat, "patched")


def test_a_browser_that_is_closed_in_the_middle_leaves_model_and_page_as_they_were(live, browser, chat):
    address, stage = live
    before, hooks = fingerprint(stage.lm.model), n_hooks(stage.lm.model)
    with Slow(stage) as slow:
        context = browser.new_context()
        left = context.new_page()
        left.goto(address)
        left.get_by_label("Longest reply").fill(str(LONG))
        ask(left, wait=False)
        left.locator(".original .caret").wait_for()
        ask(chat, wait=False)
        chat.get_by_text("waiting").first.wait_for()
        context.close()
        idle(chat)
        assert slow.passes < LONG
    assert (fingerprint(stage.lm.model), n_hooks(stage.lm.model)) == (before, hooks)
    assert reply(chat, "original") == stage.lm.generate(ASKED, max_new_tokens=12)[0].strip()


def test_what_is_typed_is_text_and_no_markup(chat):
    ask(chat, f"<img src=x onerror=alert(1)> {ASKED}")
    assert chat.locator(".talk img").count() == 0


def test_a_prompt_that_is_too_long_is_told_and_the_page_goes_on(chat):
    ask(chat, words(*[9] * 300), wait=False)
    chat.get_by_role("alert").get_by_text("256").wait_for()
    ask(chat)
    assert not chat.get_by_role("alert").is_visible()


def test_reports_are_listed_and_opened(live, page):
    page.goto(live[0])
    page.get_by_role("link", name="Reports").click()
    page.get_by_role("link", name="one").click()
    page.get_by_role("heading", name="What was measured").wait_for()
    page.go_back()
    page.get_by_role("link", name="lr=1% #2?").click()
    page.get_by_role("heading", name="Another rate").wait_for()
    assert page.request.get(f"{live[0]}runs/../pyproject.toml").status == 404


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_nothing_is_wider_than_the_window(chat, overflow):
    ask(chat)
    assert overflow(chat) <= 0
