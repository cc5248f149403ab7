"""Plots of a report, as inline SVG."""

from __future__ import annotations

from .drawing import COLOURS, INK, QUIET, canvas, drawn
from .report import Report
from .words import SETS


def accuracies(report: Report) -> str:
    """Accuracy by set, before and after, with intervals."""
    figure, axes = canvas(7.2, 2.9)
    summary = report.summary()
    names = [name for name in SETS if f"{name}/generated_accuracy" in summary]
    for row, name in enumerate(names):
        parts = summary[f"{name}/generated_accuracy"]
        before, after = parts["base"], parts["patched"]
        if before.value is None or after.value is None:
            continue
        axes.plot([after.value, before.value], [row, row], color=QUIET, lw=1, zorder=1)
        axes.plot([after.low, after.high], [row, row], color=COLOURS[0], lw=5, alpha=0.25, solid_capstyle="round")
        axes.scatter(before.value, row, color=INK, s=40, zorder=3, label="before" if row == 0 else None)
        axes.scatter(after.value, row, color=COLOURS[0], s=40, zorder=3, label="after" if row == 0 else None)
    axes.set_yticks(range(len(names)), [SETS[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("questions answered right")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, loc="lower left", ncols=2, bbox_to_anchor=(0, 1))
    return drawn(figure)


def tradeoff(report: Report) -> str:
    """Every patch by what it forgets and what it keeps; the corner wanted is the lower right one. Empty if the
    benchmark asks nothing of the one kind or the other.
    """
    figure, axes = canvas(6.4, 4.2)
    for i, entry in enumerate(report.entries):
        summary = report.summary(entry)
        kept, forgot = summary.get("out_near/generated_accuracy"), summary.get("in_easy/generated_accuracy")
        if kept is None or forgot is None:
            continue
        x, y = kept["patched"], forgot["patched"]
        if x.value is None or y.value is None:
            continue
        colour = COLOURS[i % len(COLOURS)]
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
    return drawn(figure)


def calibration(report: Report) -> str:
    """Retained utility by strength, as tried; 1 is what was asked for. Empty if nothing was calibrated."""
    curves = [(entry, entry.curve) for entry in report.entries if entry.curve]
    if not curves:
        return ""
    figure, axes = canvas(6.4, 3.2)
    axes.axhline(1, color=QUIET, lw=1, ls="--")
    for i, (entry, curve) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4, lw=1.4, label=entry.name)
        axes.axvline(entry.strength, color=colour, lw=1, alpha=0.4)
    axes.set_xlabel("strength of the edit")
    axes.set_ylabel("retained utility, 1 = as asked")
    axes.legend(frameon=False, fontsize=9)
    return drawn(figure)
