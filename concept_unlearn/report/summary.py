"""A report as plain data: its numbers, and a row an example."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from ..evaluation.measured import Measured, compared
from .reading import worst_case
from .report import Entry, Report


def summary(report: Report) -> dict[str, Any]:
    labelled = report.labelled
    metrics = {label: _metrics(report, e.results) for label, e in labelled.items()}
    found = {
        "model": report.model,
        "fingerprint": report.fingerprint,
        "benchmark": report.benchmark,
        "spec": report.spec,
        "digest": report.digest,
        "patch": next(iter(labelled), None),
        "metrics": next(iter(metrics.values()), _metrics(report, report.base.results)),
        "compared": metrics,
        "as_made": {label: _metrics(report, e.as_made) for label, e in labelled.items() if e.as_made},
        "seeds": {name: _spread(group) for name, group in report.groups.items() if len(group) > 1},
        "strength": {label: e.strength for label, e in labelled.items()},
        "calibration": {label: e.curve for label, e in labelled.items()},
        "cost": {label: e.cost and e.cost.model_dump() for label, e in labelled.items()},
        "about": {label: e.about for label, e in labelled.items()},
        "attacks": {label: _attacks(report, e) for label, e in labelled.items() if e.attacks},
        "ceiling": _attacks(report, report.base),
        "missing": report.missing,
        "provenance": report.provenance,
    }
    if report.retrained:
        found["gaps"] = {label: _gaps(report.retrained, e) for label, e in labelled.items()}
    return found


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """``index`` is a string, as JSON's keys are. A metric over several sets has no value of one example."""
    labelled = report.labelled
    for name, questions in report.questions.items():
        for i, question in enumerate(questions):
            row: dict[str, Any] = {"set": name, "index": str(i), **question.model_dump()}
            row["base"] = _seen(report.base, name, i, len(questions))
            if report.retrained:
                row["retrained"] = _seen(report.retrained, name, i, len(questions))
            yield row | {"patched": {label: _seen(e, name, i, len(questions)) for label, e in labelled.items()}}


def item_values(results: Mapping[str, Measured], name: str, n: int) -> dict[str, tuple[float | None, ...]]:
    """By metric of one set, its n examples' values."""
    return {
        metric.removeprefix(f"{name}/"): found.values
        for metric, found in results.items()
        if metric.startswith(f"{name}/") and len(found.values) == n
    }


def _metrics(report: Report, results: Mapping[str, Measured]) -> dict[str, Any]:
    """Each beside the untouched and the retrained model's, and how it compares with the untouched one's."""
    return {metric: _metric(report, metric, found) for metric, found in results.items()}


def _metric(report: Report, metric: str, found: Measured) -> dict[str, Any]:
    line: dict[str, Any] = {}
    before = report.base.results.get(metric)
    if before is not None:
        line["base"] = before.value
    line |= {"patched": found.value, "low": found.low, "high": found.high, "n": found.n, "n_total": found.n_total}
    if before is not None:
        line |= {"relative": _interval(found, before, "ratio"), "change": _interval(found, before, "difference")}
    if report.retrained and (wanted := report.retrained.results.get(metric)):
        line["retrained"] = wanted.value
    return line | ({"notes": found.notes} if found.notes else {})


def _interval(after: Measured, before: Measured, how: Any) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), compared(after, before, how), strict=True))


def _attacks(report: Report, entry: Entry) -> dict[str, Any]:
    found = worst_case(report, entry)
    return {
        "worst": found and {"attack": found[0], "leak": found[1]},
        "tried": {
            name: {
                "results": {m: {"value": r.value, "low": r.low, "high": r.high} for m, r in outcome.results.items()},
                "curve": outcome.curve,
                "skipped": outcome.skipped,
            }
            for name, outcome in entry.attacks.items()
        },
    }


def _gaps(retrained: Entry, entry: Entry) -> dict[str, Any]:
    """Signed: after - retrained."""
    wanted = retrained.results
    return {m: _interval(found, wanted[m], "difference") for m, found in entry.results.items() if m in wanted}


def _spread(entries: tuple[Entry, ...]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds for which a metric is defined."""
    found = {}
    for metric in dict.fromkeys(m for e in entries for m in e.results):
        values = [r.value for e in entries if (r := e.results.get(metric)) and r.value is not None]
        mean = statistics.fmean(values) if values else None
        found[metric] = {"mean": mean, "sd": statistics.stdev(values) if len(values) > 1 else None, "n": len(values)}
    return found


def _seen(entry: Entry, name: str, i: int, n: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"reply": entry.said[name][i]} if name in entry.said else {}
    return seen | {metric: values[i] for metric, values in item_values(entry.results, name, n).items()}
