"""A report as one page that needs nothing else: no script from elsewhere, no font, no image file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import plots
from .report import Report
from .table import report_examples
from .words import COLUMNS, LINES, SETS, interval, shown


def render(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        lines=_lines(report),
        columns=[name for name, *_ in COLUMNS],
        compared=_compared(report),
        examples=[_example(report, name, i) for name, i in report_examples(report, 6)],
        browser=[(SETS[name], [_example(report, name, i) for i in range(len(rows))]) for name, rows in _probes(report)],
        accuracies=plots.accuracies(report),
        tradeoff=plots.tradeoff(report) if len(report.entries) > 1 else "",
        calibration=plots.calibration(report),
    )


def _lines(report: Report) -> list[dict[str, str]]:
    summary = report.summary()
    return [
        {
            "section": line.section,
            "label": line.label,
            "before": shown(line.kind, parts, "base") if "base" in parts else "",
            "after": shown(line.kind, parts, "patched"),
            "interval": interval(line.kind, parts),
            "wanted": line.wanted,
        }
        for line in LINES
        if (parts := summary.get(line.metric)) is not None
    ]


def _compared(report: Report) -> list[dict[str, Any]]:
    rows = []
    for entry in report.entries:
        summary = report.summary(entry)
        cells = [shown(kind, summary[metric], "patched") if metric in summary else "–" for _, metric, kind in COLUMNS]
        rows.append({"entry": entry, "cells": cells})
    return rows


def _probes(report: Report) -> list[tuple[str, Any]]:
    return [(name, rows) for name, rows in report.base.probes.items() if rows]


def _example(report: Report, name: str, i: int) -> dict[str, Any]:
    before, after = report.base.probes[name][i], report.main.rows.probes[name][i]
    return {
        "set": SETS[name],
        "prompt": before.prompt,
        "answers": ", ".join(before.answers),
        "before": before.generation.strip(),
        "after": after.generation.strip(),
        "right_before": before.generated_right,
        "right_after": after.generated_right,
    }
