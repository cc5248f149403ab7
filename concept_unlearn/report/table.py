"""A report in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import Report
from .words import COLUMNS, LINES, interval, shown

_EXAMPLES = 3


def render(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_main(report)]
    if len(report.entries) > 1:
        parts.append(_compared(report))
    parts.append(_examples(report))
    return Group(*parts)


def _main(report: Report) -> Table:
    main, summary = report.main, report.summary()
    title = f"{report.benchmark.scope.name}: unlearned from {report.model} by {main.name}"
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("95 % interval", justify="right", style="dim")
    table.add_column("wanted", style="dim")
    section = ""
    for line in LINES:
        if line.metric not in summary:
            continue
        if line.section != section:
            table.add_section()
            table.add_row(Text(line.section, style="bold"))
            section = line.section
        parts = summary[line.metric]
        before = shown(line.kind, parts, "base") if "base" in parts else ""
        table.add_row(
            f"  {line.label}", before, shown(line.kind, parts, "patched"), interval(line.kind, parts), line.wanted
        )
    cost = main.cost
    table.caption = (
        f"strength {main.strength:.3g}; {cost.n_parameters:,} numbers, {cost.n_bytes / 1024:.0f} KB; "
        f"time of a forward pass x{cost.latency:.3f}"
    )
    table.caption_justify = "left"
    return table


def _compared(report: Report) -> Table:
    table = Table(title="Beside it, each at its own calibrated strength", title_justify="left")
    table.add_column("")
    for name, *_ in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("strength", justify="right", style="dim")
    for entry in report.entries:
        summary = report.summary(entry)
        cells = [shown(kind, summary[metric], "patched") if metric in summary else "–" for _, metric, kind in COLUMNS]
        table.add_row(Text(entry.name), *cells, f"{entry.strength:.3g}", style="bold" if entry is report.main else "")
    return table


def _examples(report: Report) -> Table:
    table = Table(title="Before and after", title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=3)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    for name, i in report_examples(report):
        before, after = report.base.probes[name][i], report.main.rows.probes[name][i]
        table.add_row(Text(before.prompt), _oneline(before.generation), _oneline(after.generation))
    return table


def report_examples(report: Report, n: int = _EXAMPLES) -> list[tuple[str, int]]:
    """Two chat questions about the concept and one about a neighbour, as far as there are any."""
    picks: list[tuple[str, int]] = []
    for name, wanted in (("in_easy", n - 1), ("out_near", 1)):
        rows = report.base.probes.get(name, ())
        order = sorted(range(len(rows)), key=lambda i: (not rows[i].chat, i))
        picks += [(name, i) for i in order[:wanted]]
    return picks


def _oneline(text: str) -> Text:
    """Not a str, in which rich would take brackets for markup."""
    return Text(" ".join(text.split()))
