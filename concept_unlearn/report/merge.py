"""Several runs as one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..errors import EmptyData, InvalidConfig
from .report import Entry, Report

_SHARED = ("model", "fingerprint", "benchmark", "digest", "leaks", "keeps")
"""What reports must agree in, as far as both say it."""


def merged(reports: Mapping[str, Report]) -> Report:
    if not reports:
        raise EmptyData("no report to compare: give at least one")
    (first, lead), *others = reports.items()
    for run, report in others:
        for name in _SHARED:
            own, wanted = getattr(report, name), getattr(lead, name)
            if own and wanted and own != wanted:
                raise InvalidConfig(f"{run} and {first} differ in {name}: {_words(own)}, not {_words(wanted)}")
    often = Counter((e.name, e.seed) for report in reports.values() for e in report.entries)
    entries = [
        _renamed(e, f"{run}/{e.name}") if often[e.name, e.seed] > 1 else e
        for run, report in reports.items()
        for e in report.entries
    ]
    retrained = next((r.retrained for r in reports.values() if r.retrained is not None), None)
    provenance = {run: report.provenance for run, report in reports.items()}
    missing = {f"{run}/{name}": why for run, report in reports.items() for name, why in report.missing.items()}
    changed = {"entries": tuple(entries), "missing": missing, "retrained": retrained, "provenance": provenance}
    return Report(**(dict(lead) | changed))


def _renamed(entry: Entry, name: str) -> Entry:
    return entry.model_copy(update={"name": name})


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
