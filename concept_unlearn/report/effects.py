"""Plots of the G-effect, as SVG: along a run, by layer, and passage by passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.g_effect import Effect, GEffect, PGEffect
from .drawing import COLOURS, INK, QUIET, Drawing, canvas, drawn, panels

_GROUPS = {"embed": "#a16207", "shallow": "#7cc4bd", "middle": "#0f8a80", "deep": "#0b3f3b", "head": "#be185d"}
"""Blocks from light to dark with depth."""
_SIDES = (("unlearning", "on forgotten text, $e_u$", COLOURS[0]), ("retaining", "on retained text, $e_r$", COLOURS[1]))


def along(found: GEffect) -> Drawing:
    """Effects by step, those on forgotten text on the left, a line for each group of layers and their total.

    The two of an objective have one scale, different objectives do not.
    """
    n = len(found.objectives)
    figure, axes = panels(9.0, 0.7 + 2.3 * n, n, 2)
    for own, objective in zip(axes, found.objectives, strict=True):
        for ax, (side, title, _) in zip(own, _SIDES, strict=True):
            _zero(ax, horizontal=True)
            for part, colour in {"total": INK, **_GROUPS}.items():
                rows = [r for r in found.rows if r.objective == objective and r.part == part and r.level != "layer"]
                style: dict[str, Any] = {"ls": "--", "lw": 1.2} if part == "total" else {"lw": 1.6, "marker": "o"}
                ax.plot([r.step for r in rows], [getattr(r, side) for r in rows], color=colour, ms=3, **style)
                _errors(ax, [r.step for r in rows], rows, side, colour)
            ax.set_title(title if objective == found.objectives[0] else "", fontsize=10)
        own[0].set_ylabel(objective)
    for ax in axes[-1]:
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    lines = axes[0][0].get_lines()[1:]  # the first is the zero
    figure.legend(lines, ["total", *_GROUPS], loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return drawn(figure)


def by_layer(found: GEffect, step: int | None = None) -> Drawing:
    """Bars for every layer, the two effects side by side, an objective a row, each to its own scale.

    Of the first step, unless another is asked for.
    """
    step, n = found.rows[0].step if step is None else step, len(found.objectives)
    figure, axes = panels(9.0, 0.7 + 2.0 * n, n, 1)
    for ax, objective in zip(axes[:, 0], found.objectives, strict=True):
        rows = [r for r in found.rows if (r.objective, r.level, r.step) == (objective, "layer", step)]
        places = [-1.0, *range(1, len(rows) - 1), len(rows) + 0.0]  # embed and head stand apart
        _zero(ax, horizontal=True)
        for offset, (side, title, colour) in zip((-0.2, 0.2), _SIDES, strict=True):
            x = [place + offset for place in places]
            ax.bar(x, [getattr(r, side) for r in rows], 0.4, color=colour, label=title)
            _errors(ax, x, rows, side, INK)
        total = found.at(objective, step=step)
        ax.set_title(f"{objective}: in total {total.unlearning:.3g} and {total.retaining:.3g}", fontsize=9, loc="left")
        ax.grid(visible=False, axis="x")
    blocks = range(1, len(rows) - 1, max(len(rows) // 12, 1))
    ticks = [0, *blocks, len(rows) - 1]
    axes[-1, 0].set_xticks([places[i] for i in ticks], [rows[i].part for i in ticks])
    axes[-1, 0].set_xlabel("block")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return drawn(figure)


def points(found: PGEffect) -> Drawing:
    """Every passage by what ascent on it would do, coloured by the weight that it has."""
    figure, axes = canvas(6.4, 4.2)
    _zero(axes, horizontal=True)
    _zero(axes, horizontal=False)
    seen = axes.scatter(
        [p.unlearning for p in found.points], [p.retaining for p in found.points],
        c=[p.weight for p in found.points], cmap="viridis_r", vmin=0, s=45, edgecolors=INK, linewidths=0.4, zorder=3,
    )  # fmt: skip
    axes.set_xlabel("$PG_i$ on forgotten text, wanted far below 0")
    axes.set_ylabel("$PG_i$ on retained text, wanted near 0")
    figure.colorbar(seen, ax=axes, label="weight $w_i$").outline.set_visible(False)
    return drawn(figure)


def _zero(axes: Any, *, horizontal: bool) -> None:
    (axes.axhline if horizontal else axes.axvline)(0, color=QUIET, lw=1, zorder=1)


def _errors(axes: Any, x: Sequence[float], rows: Sequence[Effect], side: str, colour: str) -> None:
    """One standard error each way, where there are any."""
    errors = [getattr(r, f"{side}_error") for r in rows]
    if None not in errors:
        axes.errorbar(x, [getattr(r, side) for r in rows], errors, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
