"""Several patches of one model under one benchmark."""

from __future__ import annotations

from collections.abc import Mapping

from .data.encode import encode_text
from .evaluation.concept import ConceptBenchmark
from .evaluation.cost import measure_cost
from .lm import LM
from .patches import Patch
from .report import Entry, Report
from .tracking import Progress

_COST_TEXTS = 2


def compare(
    lm: LM, patches: Mapping[str, Patch], benchmark: ConceptBenchmark, *, progress: Progress | None = None
) -> Report:
    """The unpatched model and every patch, observed on the same examples. The first patch leads the report."""
    base = benchmark.observe(lm, progress=progress)
    entries = tuple(observe(lm, name, patch, benchmark, progress=progress) for name, patch in patches.items())
    return Report(lm.name, benchmark, base, entries)


def observe(
    lm: LM,
    name: str,
    patch: Patch,
    benchmark: ConceptBenchmark,
    *,
    curve: tuple[tuple[float, float], ...] = (),
    about: str = "",
    progress: Progress | None = None,
) -> Entry:
    """One line of a report."""
    rows = benchmark.observe(lm, patch, progress=progress)
    texts = [
        encode_text(lm.tokenizer, p.text, p.prompt)[: benchmark.max_tokens]
        for p in benchmark.scope.retain[:_COST_TEXTS]
    ]
    return Entry(name, rows, patch.strength, curve, measure_cost(lm, patch, texts), about or f"a {patch.kind} patch")
