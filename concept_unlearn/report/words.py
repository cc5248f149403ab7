"""The metrics of a report in the words of somebody who meets them for the first time."""

from __future__ import annotations

from typing import NamedTuple

from ..evaluation.bootstrap import Estimate

SETS = {
    "in_easy": "about the concept",
    "in_hard": "about the concept, reworded or indirect",
    "out_near": "about its neighbours",
    "out_far": "about anything else",
}


class Line(NamedTuple):
    section: str
    label: str
    metric: str
    kind: str
    """percent or ratio"""
    wanted: str


LINES = (
    Line("Forgotten", "answers right, questions about the concept", "in_easy/generated_accuracy", "percent", "low"),
    Line("Forgotten", "… reworded, indirect, other formats", "in_hard/generated_accuracy", "percent", "low"),
    Line("Forgotten", "picks the right answer from a list", "in_easy/ranked_accuracy", "percent", "low"),
    Line("Forgotten", "perplexity on text about the concept", "forget/perplexity", "ratio", "high"),
    Line("Kept", "answers right, neighbouring knowledge", "out_near/generated_accuracy", "percent", "as before"),
    Line("Kept", "answers right, general knowledge", "out_far/generated_accuracy", "percent", "as before"),
    Line("Kept", "perplexity on general text", "general/perplexity", "ratio", "as before"),
    Line("Side effects", "gibberish answers about the concept", "in_scope/gibberish", "percent", "as before"),
    Line("Side effects", "gibberish answers elsewhere", "out_of_scope/gibberish", "percent", "as before"),
    Line("Side effects", "questions about the concept the patch touches", "in_easy/touched", "percent", "high"),
    Line("Side effects", "… reworded, indirect, other formats", "in_hard/touched", "percent", "high"),
    Line("Side effects", "neighbouring questions the patch touches", "out_near/touched", "percent", "low"),
    Line("Side effects", "general questions the patch touches", "out_far/touched", "percent", "low"),
)

COLUMNS = (
    ("easy", "in_easy/generated_accuracy", "percent"),
    ("hard", "in_hard/generated_accuracy", "percent"),
    ("near", "out_near/generated_accuracy", "percent"),
    ("far", "out_far/generated_accuracy", "percent"),
    ("perplexity", "general/perplexity", "ratio"),
    ("gibberish", "in_scope/gibberish", "percent"),
)


def shown(line_kind: str, parts: dict[str, Estimate], which: str) -> str:
    """``which``: base or patched. A ratio is shown as the perplexity itself for the base, as a factor for the patch."""
    if line_kind == "percent":
        return percent(parts.get(which))
    return number(parts["base"]) if which == "base" else factor(parts["relative"])


def percent(found: Estimate | None) -> str:
    return "–" if found is None or found.value is None else f"{found.value:.0%}"


def number(found: Estimate) -> str:
    return "–" if found.value is None else f"{found.value:.3g}"


def factor(found: Estimate) -> str:
    return "–" if found.value is None else f"x{found.value:.3f}"


def interval(line_kind: str, parts: dict[str, Estimate]) -> str:
    found = parts["patched"] if line_kind == "percent" else parts["relative"]
    if found.low is None or found.high is None:
        return ""
    if line_kind == "percent":
        return f"{found.low * 100:.0f}–{found.high:.0%}"
    return f"{found.low:.3f}–{found.high:.3f}"
