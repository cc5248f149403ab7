"""Plots and bars show every method where it is."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from concept_unlearn.evaluation.attacks.base import Outcome
from concept_unlearn.evaluation.measured import Measured
from concept_unlearn.report import plots
from concept_unlearn.report.bars import bars
from concept_unlearn.report.plane import Plane, axis


def circles(drawing):
    """x, y and whether it is filled, by title."""
    marks = re.findall(r'fill:([^;]*);[^>]*><title>([^<]*)</title><circle cx="([\d.]+)" cy="([\d.]+)"', drawing)
    return {title: (float(x), float(y), "paper" not in fill) for fill, title, x, y in marks}


@pytest.mark.parametrize(
    "values", [(0, 1), (0.1, 0.9), (3, 3), (-40, 15), (0, 0), (1e-9, 2e-9), (-5, -5), (0.98, 1.01), (1, 1.008)]
)
def test_ticks_are_few_and_round_and_around_every_value(values):
    found = axis("x", "number", values).ticks
    assert found[0] <= min(values) <= max(values) <= found[-1]
    assert 2 <= len(found) <= 7
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.0e}"[0] in "125"
    shown = re.findall(r">([^<]*)</text>", Plane(axis("x", "number", values), axis("y", "number", (0, 1))).drawn("x"))
    assert len(set(shown[: len(found)])) == len(found)


def test_ticks_golden():
    assert axis("x", "number", (0, 1)).ticks == (0, 0.5, 1)
    assert axis("x", "number", (-40, 15)).ticks == (-40, -20, 0, 20)
    assert {
        (axis("x", "percent", [share]).ticks[0], axis("x", "percent", [share]).ticks[-1]) for share in (0.0, 0.4, 1.0)
    } == {(0, 1)}


def test_more_is_to_the_right_and_above():
    plane = Plane(axis("x", "number", (0, 1)), axis("y", "number", (0, 1)))
    for title, point in (("low", (0, 0)), ("high", (1, 1))):
        plane.mark(point, "dot", "red", title)
    found = circles(plane.drawn("plot"))
    assert found["low"][0] < found["high"][0]
    assert found["low"][1] > found["high"][1]


def test_names_of_marks_that_lie_on_one_another_are_joined():
    plane = Plane(axis("x", "number", (0, 1)), axis("y", "number", (0, 1)))
    for name in ("1", "2", "1"):
        plane.mark((0.5, 0.5), "dot", "red", "", name=name)
    plane.mark((0.1, 0.1), "dot", "red", "", name="3")
    assert re.findall(r'class="name">([^<]*)<', plane.drawn("plot")) == ["3", "1, 2"]


def test_the_tradeoff_has_filled_points_as_calibrated_and_hollow_ones_as_made(rich_report):
    found = circles(plots.tradeoff(rich_report))
    calibrated, made = (next(v for k, v in found.items() if k.startswith(start)) for start in ("sae:", "sae, as made:"))
    assert (calibrated[2], made[2]) == (True, False)
    assert calibrated[0] > made[0]
    assert calibrated[1] < made[1]
    drawing = plots.tradeoff(rich_report)
    assert "untouched: 100% left, 100% kept" in drawing
    assert "retrained: 50% left, 100% kept" in drawing


def test_the_front_holds_no_point_that_another_beats():
    stairs = plots._stairs([(0.5, 0.1), (0.9, 0.3), (0.8, 0.3), (0.4, 0.2), (0.95, 0.9)])
    assert stairs == [(0.5, 0.1), (0.5, 0.3), (0.9, 0.3), (0.9, 0.9), (0.95, 0.9)]


def test_a_method_without_a_number_is_left_out_and_without_any_there_is_no_plot(made, entry):
    gone = entry("gone", results={"easy/accuracy": Measured(value=None), "near/accuracy": Measured(value=1.0)})
    assert "gone" not in plots.tradeoff(made(gone, entry()))
    assert plots.tradeoff(made(gone)) is None
    assert plots.tradeoff(made()) is None


def test_calibration_fills_the_strength_that_was_chosen(rich_report, made, entry):
    found = circles(plots.calibration(rich_report))
    assert {title: filled for title, (*_, filled) in found.items()} == {
        "sae: strength 0.25, utility 1": False,
        "sae: strength 0.5, utility 0.99": True,
        "sae: strength 1, utility 0.75": False,
    }
    assert plots.calibration(made(entry())) is None


def test_efforts_are_drawn_by_attack(rich_report, made, entry):
    assert list(plots.efforts(rich_report)) == ["relearn"]
    assert "100% after 50" in plots.efforts(rich_report)["relearn"]
    assert plots.efforts(made(entry())) == {}


def test_bars_are_shares_of_the_whole_with_the_untouched_models_as_ceiling(rich_report):
    sae, *_ = bars(rich_report)
    assert [(b.name, b.length, b.ceiling, b.is_worst) for b in sae.bars] == [
        ("asked plainly", 0.25, 1.0, False), ("relearn", 0.75, 1.0, True), ("quantise", 0.25, 1.0, False),
        ("translate", None, None, False),
    ]  # fmt: skip
    assert sae.bars[-1].why == "no translator"


def test_every_method_has_the_same_bars_in_the_same_order(rich_report):
    found = bars(rich_report)
    assert [(own.label, own.mark) for own in found] == [("sae", 0), ("npo, seed 1", 1), ("npo, seed 2", 1)]
    assert len({tuple(b.name for b in own.bars) for own in found}) == 1
    assert found[1].bars[2].why == "not tried"


def test_bars_of_a_number_reach_from_zero_to_the_largest(made, entry):
    tried = {"ask": Outcome(results={"easy/accuracy": Measured(value=4.0)})}
    (own,) = bars(made(entry(attacks=tried), lines=()))
    assert [b.length for b in own.bars] == [0.0625, 1.0]
    assert own.bars[0].ceiling == 0.25


def test_without_attacks_there_are_no_bars(made, entry):
    assert bars(made(entry())) == []
