"""Plots of the G-effect: every objective, every group and every passage is there, and a notebook can show it."""

from __future__ import annotations

import pytest
from conftest import words

from concept_unlearn.data.scope import Scope
from concept_unlearn.evaluation.g_effect import g_effect, pg_effect, trace_g_effect
from concept_unlearn.methods.finetune import Finetune
from concept_unlearn.objectives import GA, NPO
from concept_unlearn.report import effects


@pytest.fixture
def scope():
    forget, retain = ([words(*range(i, i + 6)) for i in starts] for starts in (range(30, 36), range(8, 14)))
    return Scope.of("tiny", forget=forget, retain=retain, out_far=[])


def shows(drawing, *texts):
    """Letters are drawn as paths, each text named in a comment."""
    assert drawing._repr_svg_() == drawing
    assert drawing.startswith("<svg")
    return all(f"<!-- {text} -->" in drawing for text in texts)


def test_along_a_run_every_objective_has_its_lines(lm, scope):
    method = Finetune(objectives=(GA(),), max_steps=2, batch_size=3)
    found = trace_g_effect(lm, scope, method, objectives=[GA(), NPO(beta=1)], every=1, batches=1, batch_size=2)
    drawing = effects.along(found)
    assert shows(drawing, "ga", "npo(beta=1.0)", "total", "embed", "shallow", "middle", "deep", "head", "step")


def test_by_layer_every_layer_of_every_objective_has_two_bars(lm, scope):
    drawing = effects.by_layer(g_effect(lm, scope, [GA(), NPO()], batches=2, batch_size=1))
    assert shows(drawing, "embed", "0", "1", "2", "head", "block")
    assert drawing.count("#c2410c") == drawing.count("#0f766e") == 2 * 5 + 1  # and one in the legend


def test_every_passage_is_a_point(lm, scope):
    drawing = effects.points(pg_effect(lm, scope, batches=1, batch_size=3))
    assert shows(drawing)
    assert drawing.count('<use xlink:href="#C0_0_') == 3
