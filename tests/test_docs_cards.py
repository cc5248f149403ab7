"""A card for each method: what it says of settings and numbers is what the classes and the results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from concept_unlearn.methods import PRESETS, Method
from concept_unlearn.training import Optimisation

DOCS = Path(__file__).parents[1] / "docs"
CARDS = {card.stem: card.read_text() for card in sorted((DOCS / "methods").glob("*.md"))}
KINDS = {name: (name,) for name in CARDS} | {"masks": ("finetune",), "black_box": ("black_box", "prefix")}
SECTIONS = ("Formula", "Settings", "Our numbers", "When it fails")
ROWS = ("Changes", "Must see", "Costs to make", "Costs to run", "Undone by")


def section(card, title):
    return CARDS[card].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def tables(text):
    """Each table, with the page of results that was named last before it."""
    for found in re.finditer(r"^\|.*(?:\n\|.*)+", text, re.M):
        (*_, page) = re.findall(r"\((\.\./results/\w+\.md)\)", text[: found.start()])
        yield page, found[0].splitlines()


def test_every_method_has_a_card_and_every_card_is_in_the_table():
    ours = {kind for kind, found in Method.members.items() if found.__module__.startswith("concept_unlearn.")}
    assert {kind for kinds in KINDS.values() for kind in kinds} == ours
    assert set(re.findall(r"\(methods/(\w+)\.md\) \|", (DOCS / "methods.md").read_text())) == set(CARDS)


@pytest.mark.parametrize("card", CARDS)
def test_a_card_says_where_from_what_at_what_price_and_when_not(card):
    assert tuple(re.findall(r"^## (.*)$", CARDS[card], re.M)) == SECTIONS
    head = CARDS[card].partition("\n## ")[0]
    assert re.search(r"^\| Papers? \| .*\d{4}\.\d{5}", head, re.M)
    assert all(f"\n| {row} | " in head for row in ROWS)
    assert len(re.findall(r"^- ", section(card, "When it fails"), re.M)) >= 2


@pytest.mark.parametrize("card", [card for card in CARDS if card != "masks"])
def test_a_card_shows_every_setting_that_is_not_common_to_all_trainings(card):
    shown = section(card, "Settings")
    for kind in KINDS[card]:
        for name in Method.members[kind].model_fields.keys() - Optimisation.model_fields.keys():
            assert re.search(rf"\b{name}:", shown), f"{kind}: {name}"


@pytest.mark.parametrize("card", CARDS)
def test_the_presets_of_a_card_are_there(card):
    for row in re.findall(r"^\| Presets? \| (.*) \|$", CARDS[card], re.M):
        assert set(re.findall(r"`(\w+)`", row)) <= PRESETS.keys()


@pytest.mark.parametrize("card", CARDS)
def test_the_numbers_of_a_card_stand_in_the_results_word_for_word(card):
    found = list(tables(section(card, "Our numbers")))
    assert found
    for page, lines in found:
        results = (DOCS / "methods" / page).resolve().read_text().splitlines()
        assert [line for line in lines if line not in results] == []
