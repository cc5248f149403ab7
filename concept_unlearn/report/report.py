"""What was observed of a model and of patches of it, and everything that is made of that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ..evaluation.bootstrap import Estimate
from ..evaluation.concept import ConceptBenchmark, Rows
from ..evaluation.cost import Cost
from ..evaluation.fluency import MAX_SURPRISE
from ..files import write_atomically

Summary = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Entry:
    """One patch in a report."""

    name: str
    rows: Rows
    strength: float
    curve: tuple[tuple[float, float], ...]
    """(strength, retained utility) as calibration tried them; empty if it did not."""
    cost: Cost
    about: str
    """One line on what the patch is."""


@dataclass(frozen=True)
class Report:
    """The first entry is what the report is about; the others stand beside it for comparison."""

    model: str
    benchmark: ConceptBenchmark
    base: Rows
    entries: tuple[Entry, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Entry:
        return self.entries[0]

    def summary(self, entry: Entry | None = None) -> Summary:
        return self.benchmark.summarise(self.base, (entry or self.main).rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One a probe or passage: what the base made of it, and what each patched model did."""
        for name, base in self.base.probes.items():
            for i, row in enumerate(base):
                line: dict[str, Any] = {"set": name, "index": str(i), "prompt": row.prompt, "chat": row.chat}
                line |= {"answers": row.answers, "base": _probe(self.base, name, i)}
                yield line | {"patched": {e.name: _probe(e.rows, name, i) for e in self.entries}}
        for name, texts in self.base.texts.items():
            for i, text in enumerate(texts):
                line = {"set": f"text/{name}", "index": str(i), "text": text.text, "n_tokens": text.n_tokens}
                line |= {"base": {"logprob": text.logprob}}
                yield line | {"patched": {e.name: {"logprob": e.rows.texts[name][i].logprob} for e in self.entries}}

    def as_json(self) -> dict[str, Any]:
        """``metrics`` are those of the first entry; ``compared`` holds every entry's."""
        compared = {entry.name: _flat(self.summary(entry)) for entry in self.entries}
        return {
            "model": self.model,
            "scope": self.benchmark.scope.name,
            "patch": self.main.name,
            "metrics": compared[self.main.name],
            "compared": compared,
            "strength": {entry.name: entry.strength for entry in self.entries},
            "calibration": {entry.name: entry.curve for entry in self.entries},
            "cost": {entry.name: entry.cost._asdict() for entry in self.entries},
            "about": {entry.name: entry.about for entry in self.entries},
            "provenance": self.provenance,
        }

    def table(self) -> RenderableType:
        """For a terminal."""
        from .table import render

        return render(self)

    def html(self) -> str:
        from .html import render

        return render(self)

    def save(self, folder: str | Path) -> Path:
        """``report.html``, ``summary.json`` and ``rows.jsonl``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        write_atomically(folder / "rows.jsonl", lines.encode())
        write_atomically(folder / "summary.json", json.dumps(self.as_json(), indent=1).encode())
        write_atomically(folder / "report.html", self.html().encode())
        return folder


def _probe(rows: Rows, name: str, i: int) -> dict[str, Any]:
    row, surprise = rows.probes[name][i], rows.surprise[name][i]
    return {
        "generation": row.generation,
        "generated_right": row.generated_right,
        "ranked_right": row.ranked_right,
        "answer_logprob": row.answer_logprob,
        "gibberish": row.repetitive or surprise is None or surprise > MAX_SURPRISE,
        "surprise": surprise,
    }


def _flat(summary: Summary) -> dict[str, Any]:
    """base and patched as numbers with the patched one's interval, and how they compare with its own."""
    found = {}
    for metric, parts in summary.items():
        patched = parts["patched"]
        line: dict[str, Any] = {"base": parts["base"].value} if "base" in parts else {}
        line |= {"patched": patched.value, "low": patched.low, "high": patched.high, "n": patched.n}
        for how in ("relative", "change"):
            if how in parts:
                line[how] = {"value": parts[how].value, "low": parts[how].low, "high": parts[how].high}
        found[metric] = line
    return found
