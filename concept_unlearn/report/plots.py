"""Plots of a report, as inline SVG."""

from __future__ import annotations

import io
from typing import Any

from .report import Report
from .words import SETS

_INK, _QUIET = "#1f2933", "#9aa5b1"
_COLOURS = ("#c2410c", "#0f766e", "#6d28d9", "#0369a1", "#a16207", "#be185d")


def accuracies(report: Report) -> str:
    """Accuracy by set, before and after, with intervals."""
    figure, axes = _figure(7.2, 2.9)
    summary = report.summary()
    names = [name for name in SETS if f"{name}/generated_accuracy" in summary]
    for row, name in enumerate(names):
        parts = summary[f"{name}/generated_accuracy"]
        before, after = parts["base"], parts["patched"]
        if before.value is None or after.value is None:
            continue
        axes.plot([after.value, before.value], [row, row], color=_QUIET, lw=1, zorder=1)
        axes.plot([after.low, after.high], [row, row], color=_COLOURS[0], lw=5, alpha=0.25, solid_capstyle="round")
        axes.scatter(before.value, row, color=_INK, s=40, zorder=3, label="before" if row == 0 else None)
        axes.scatter(after.value, row, color=_COLOURS[0], s=40, zorder=3, label="after" if row == 0 else None)
    axes.set_yticks(range(len(names)), [SETS[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("questions answered right")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, loc="lower left", ncols=2, bbox_to_anchor=(0, 1))
    return _svg(figure)


def tradeoff(report: Report) -> str:
    """Every patch by what it forgets and what it keeps; the corner wanted is the lower right one. Empty if the
    benchmark asks nothing of the one kind or the other.
    """
    figure, axes = _figure(6.4, 4.2)
    for i, entry in enumerate(report.entries):
        summary = report.summary(entry)
        kept, forgot = summary.get("out_near/generated_accuracy"), summary.get("in_easy/generated_accuracy")
        if kept is None or forgot is None:
            continue
        x, y = kept["patched"], forgot["patched"]
        if x.value is None or y.value is None:
            continue
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot([x.low, x.high], [y.value, y.value], color=colour, lw=1.2, alpha=0.5)
        axes.plot([x.value, x.value], [y.low, y.high], color=colour, lw=1.2, alpha=0.5)
        axes.scatter(x.value, y.value, color=colour, s=60, zorder=3, label=entry.name)
    if not axes.collections:
        return ""
    axes.set_xlabel("kept: neighbouring questions answered right")
    axes.set_ylabel("left: concept questions answered right")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def calibration(report: Report) -> str:
    """Retained utility by strength, as tried; 1 is what was asked for. Empty if nothing was calibrated."""
    curves = [(entry, entry.curve) for entry in report.entries if entry.curve]
    if not curves:
        return ""
    figure, axes = _figure(6.4, 3.2)
    axes.axhline(1, color=_QUIET, lw=1, ls="--")
    for i, (entry, curve) in enumerate(curves):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4, lw=1.4, label=entry.name)
        axes.axvline(entry.strength, color=colour, lw=1, alpha=0.4)
    axes.set_xlabel("strength of the edit")
    axes.set_ylabel("retained utility, 1 = as asked")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.grid(alpha=0.2)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
