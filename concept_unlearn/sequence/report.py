"""What is left after each request: does what was forgotten first stay forgotten, and what is still kept?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_core import to_json
from rich.table import Table

from ..component import Frozen
from ..data.examples import Passage, Probe, normalise
from ..evaluation.benchmark import Kind
from ..evaluation.measured import Measured, compared, mean_of, undefined
from ..files import write_atomically
from ..report import words
from ..report.drawing import Drawing
from ..report.plane import INK, Axis, Plane, axis, colour
from .request import Request

Results = Mapping[str, Mapping[str, Measured]]
"""By request and metric."""


class Told(Frozen):
    """What a request's column holds."""

    metric: str
    label: str
    kind: Kind


class After(Frozen):
    """The model once a request has been served, or before any."""

    request: str
    strength: float = 1.0
    """Of the patch that serves it."""
    asked: dict[str, dict[str, Measured]]
    """By request so far, then by metric."""
    kept: Measured
    """As a multiple of what the untouched model has."""
    gibberish: Measured
    """Share of replies about all that was to be forgotten so far."""

    def left(self, request: str, report: SequenceReport) -> Measured | None:
        """Of a request served by then, how much is still known."""
        return self.asked[request][report.told[request].metric] if request in self.asked else None


class SequenceReport(Frozen):
    """A row a request, a column for what is left of each."""

    model: str
    fingerprint: str = ""
    method: dict[str, Any] = Field(default_factory=dict)
    fixed_reference: bool = False
    told: dict[str, Told]
    """By request, in order."""
    untouched: After
    """Before anything was forgotten."""
    rows: tuple[After, ...]

    def cells(self) -> list[list[str]]:
        """The table as text, its head first."""
        found = [["after", *(f"{name} left" for name in self.told), "kept", "gibberish"]]
        for row in (self.untouched, *self.rows):
            left = [_shown(told.kind, row.left(name, self)) for name, told in self.told.items()]
            found.append([row.request, *left, _shown("percent", row.kept), _shown("percent", row.gibberish)])
        return found

    def table(self) -> Table:
        """For a terminal."""
        head, *rows = self.cells()
        table = Table(caption=self._note(), caption_justify="left")
        for i, cell in enumerate(head):
            table.add_column(cell, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        head, *rows = self.cells()
        lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
        table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
        return f"{table}\n{self._note()}\n"

    def plot(self) -> Drawing:
        """What is left of each request and what is kept, request by request; rings are the untouched model."""
        marks: list[tuple[str, str, float, list[tuple[float, Measured]]]] = []
        for i, (name, told) in enumerate(self.told.items()):
            later = [(float(n), m) for n, row in enumerate(self.rows, 1) if (m := row.left(name, self))]
            marks.append((name, colour(i), self.untouched.asked[name][told.metric].value or 0.0, later))
        marks.append(("kept", INK, 1.0, [(float(n), row.kept) for n, row in enumerate(self.rows, 1)]))
        known = [m.value for *_, later in marks for _, m in later if m.value is not None]
        y = axis("left of each request; kept", "percent", [0.0, *(base for _, _, base, _ in marks), *known])
        plane = Plane(Axis("requests served", "number", tuple(map(float, range(len(self.rows) + 1)))), y)
        for name, shade, base, later in marks:
            points = [(n, m.value) for n, m in later if m.value is not None]
            plane.line([(0.0, base), *points[:1]], shade, dash="4 4", opacity=0.6)
            plane.line(points, shade)
            plane.mark((0.0, base), "ring", shade, f"{name}, untouched: {words.shown('percent', base)}")
            for n, m in later:
                if m.value is None:
                    continue
                if m.low is not None and m.high is not None:
                    plane.line([(n, max(m.low, y.ticks[0])), (n, min(m.high, y.ticks[-1]))], shade, opacity=0.5)
                title = f"{name}, {_shown('percent', m)} after {self.rows[int(n) - 1].request}"
                is_last = (n, m) == later[-1]
                plane.mark((n, m.value), "square" if name == "kept" else "dot", shade, title, name=name * is_last)
        return plane.drawn("what is left after each request")

    def save(self, folder: str | Path) -> Path:
        """``sequence.json``, which ``load`` reads, ``sequence.md`` and ``sequence.svg``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "sequence.md", self.markdown().encode())
        write_atomically(folder / "sequence.svg", self.plot().encode())
        write_atomically(folder / "sequence.json", to_json(self, indent=1, inf_nan_mode="strings"))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SequenceReport:
        return cls.model_validate_json((Path(folder) / "sequence.json").read_bytes())

    def _note(self) -> str:
        labels: dict[str, list[str]] = {}
        for name, told in self.told.items():
            labels.setdefault(told.label, []).append(name)
        left = "; ".join(f"{label} ({', '.join(names)})" for label, names in labels.items())
        reference = "; training compares with the untouched model" if self.fixed_reference else ""
        return (
            f"{self.model}, {self.method.get('kind', '')}{reference}. Left: {left}. Kept: as a share of the untouched "
            "model's. Brackets: 95 % intervals."
        )


def told(request: Request) -> Told:
    benchmark = request.benchmark
    metric = benchmark.leaks[0].name
    line = next((line for line in benchmark.lines if line.metric == metric), None)
    kind: Kind = "number" if line is None or line.kind == "factor" else line.kind
    return Told(metric=metric, label=metric if line is None else line.label, kind=kind)


def kept(requests: Sequence[Request], after: Results, untouched: Results) -> Measured:
    """What all these requests keep, over the untouched model's: each question once, none that a request is about.

    Where something is no mean over questions, the least of the requests' shares, without an interval.
    """
    forgotten = {prompt for request in requests for prompt in request.prompts}
    found = [(r, after[r.name][r.benchmark.keeps.name], untouched[r.name][r.benchmark.keeps.name]) for r in requests]
    if not all(now.is_mean and then.is_mean for _, now, then in found):
        shares = [share for _, now, then in found if (share := compared(now, then)[0]) is not None]
        return Measured(value=min(shares)) if shares else undefined("nothing that is kept has a number")
    pairs: dict[tuple[str, ...], tuple[float | None, float | None]] = {}
    for request, now, then in found:
        for e, *pair in zip(_asked(request), now.values, then.values, strict=True):
            if normalise(e.key) not in forgotten:
                pairs[(e.key, *getattr(e, "answers", ()))] = (pair[0], pair[1])
    now, then = (mean_of([pair[i] for pair in pairs.values()]) for i in (0, 1))
    value, low, high = compared(now, then)
    return Measured(value=value, low=low, high=high, n=now.n, n_total=now.n_total)


def _asked(request: Request) -> Sequence[Probe | Passage]:
    """What is kept is measured on."""
    return request.benchmark.sets[request.benchmark.keeps.on].examples


def gibberish(requests: Sequence[Request], after: Results) -> Measured:
    """Among replies about all that these requests are to forget."""
    found = [after[r.name][r.gibberish.name] for r in requests if r.gibberish is not None]
    return mean_of([value for m in found for value in m.values])


def _shown(kind: Kind, measured: Measured | None) -> str:
    if measured is None:
        return ""
    between = words.interval(kind, measured.low, measured.high)
    return words.shown(kind, measured.value) + (f" [{between}]" if between else "")
