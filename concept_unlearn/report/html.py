"""A report as one page that needs nothing else: no script from elsewhere, no font, no image file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import to_json

from . import plots, words
from .bars import bars
from .costs import costs
from .grid import columns, grid
from .plane import colour
from .reading import lacking, line_of, raw, read, told, worst_case
from .report import Entry, Report
from .summary import item_values
from .table import methods_title


def render(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["colour"] = colour
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=line_of(report, report.headline),
        cards=_cards(report),
        lines=told(report),
        columns=columns(report),
        rows=grid(report),
        methods_title=methods_title(report),
        drawings=_drawings(report),
        attacked=bars(report),
        costs=costs(report),
        lacking=lacking(report),
        provenance=to_json(report.provenance, indent=1, inf_nan_mode="strings").decode(),
        data=_embedded(_browser(report)),
    )


def _cards(report: Report) -> list[dict[str, str]]:
    """The numbers to know: what is left, what is kept, and what is left in the worst case."""
    main, found = report.main, []
    for metric in (report.headline, report.keeps):
        line = line_of(report, metric)
        card = {"label": line.label, "before": "", "now": read(report, line, main.results).text, "beside": ""}
        if report.entries:
            card["before"] = read(report, line, report.base.results).text
            if report.retrained:
                card["beside"] = f"retrained {read(report, line, report.retrained.results).text}"
        found.append(card)
    if worst := worst_case(report, main):
        line, ceiling = line_of(report, report.headline), worst_case(report, report.base)
        kind = raw(line.kind)
        card = {"label": f"{line.label}, worst case: {worst[0]}", "before": "", "now": words.shown(kind, worst[1])}
        is_other = ceiling is not None and main is not report.base
        found.append(card | {"beside": f"untouched {words.shown(kind, ceiling[1])}" if ceiling and is_other else ""})
    return found


def _drawings(report: Report) -> list[tuple[Markup, str]]:
    """Each with what is to be seen in it. What is drawn was escaped where it was drawn."""
    tradeoff = "Forgotten against kept; grey: the front, below and to the right of which there is no method."
    if any(entry.as_made for entry in report.entries):
        tradeoff += " Filled: calibrated; hollow: as made."
    if report.retrained:
        tradeoff += " Dashed: what the retrained model knows."
    found = [
        (plots.tradeoff(report), tradeoff),
        (plots.calibration(report), "How strengths were found: the filled point is the one chosen."),
        *((one, "What more effort gets. Dashed: of the untouched model.") for one in plots.efforts(report).values()),
    ]
    return [(Markup(drawing), text) for drawing, text in found if drawing]


def _browser(report: Report) -> dict[str, Any]:
    methods = report.labelled | ({"the retrained model": report.retrained} if report.retrained else {})
    return {
        "sets": {
            name: [[q.prompt, list(q.answers), int(q.chat)] for q in questions]
            for name, questions in report.questions.items()
        },
        "base": _seen(report, report.base),
        "methods": [{"label": label, **_seen(report, entry)} for label, entry in methods.items()],
    }


def _seen(report: Report, entry: Entry) -> dict[str, Any]:
    values = {
        name: {
            metric: [_short(v) for v in found]
            for metric, found in item_values(entry.results, name, len(questions)).items()
        }
        for name, questions in report.questions.items()
    }
    return {"said": entry.said, "values": values}


def _short(value: float | None) -> float | None:
    """Four digits are enough to look at."""
    return value if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _embedded(data: Any) -> Markup:
    """JSON within a script element, which nothing in it can end."""
    return Markup(to_json(data, inf_nan_mode="strings").decode().replace("<", "\\u003c"))
