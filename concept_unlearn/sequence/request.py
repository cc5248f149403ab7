"""One thing that is asked to be forgotten, which nobody reads before its turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ..component import build
from ..data.examples import normalise
from ..data.scope import Scope
from ..errors import InvalidConfig
from ..evaluation.benchmark import Benchmark
from ..evaluation.benchmarks import ConceptBenchmark
from ..evaluation.metric import Metric
from ..evaluation.metrics import Gibberish
from ..run.config import BenchmarkSpec

Asked = Scope | Benchmark | str | Path


class Request:
    """Of a scope methods learn from one half and the other is asked; a benchmark is its own request."""

    def __init__(self, asked: Asked, name: str, settings: BenchmarkSpec) -> None:
        self._asked, self.name, self._settings = asked, name, settings

    @property
    def is_scope(self) -> bool:
        return not isinstance(self._asked, Benchmark)

    @cached_property
    def whole(self) -> Scope:
        """All that is to be forgotten. Raises InvalidConfig for a benchmark that holds no such thing."""
        if isinstance(self._asked, Scope):
            return self._asked
        if isinstance(self._asked, str | Path):
            return Scope.load(self._asked)
        if self._asked.request is None:
            raise InvalidConfig(f"the {self._asked.kind} benchmark holds nothing to forget: ask for a scope")
        return self._asked.request

    @cached_property
    def learned(self) -> Scope:
        """What methods learn from."""
        return self.whole.halves().tune if self.is_scope else self.whole

    @cached_property
    def benchmark(self) -> Benchmark:
        if isinstance(self._asked, Benchmark):
            return self._asked
        return build(ConceptBenchmark, {"scope": self.whole, "half": "test", **self._settings.model_dump()})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured after every request from this one on."""
        gibberish = () if self.gibberish is None else (self.gibberish,)
        return (*self.benchmark.leaks, self.benchmark.keeps, *gibberish)

    @property
    def gibberish(self) -> Metric | None:
        return next((m for m in self.benchmark.metrics if isinstance(m, Gibberish)), None)

    @property
    def prompts(self) -> set[str]:
        """What nobody can be asked to keep any more."""
        asked = [*(p.prompt for p in self.whole.in_easy), *(p.prompt for p in self.whole.in_hard)]
        return set(map(normalise, [*asked, *(p.prompt for p in self.whole.forget if p.prompt)]))


def named(asked: Sequence[Asked], settings: BenchmarkSpec) -> tuple[Request, ...]:
    """Requests by short names, numbered where several are alike."""
    names = [Path(one).stem if isinstance(one, str | Path) else one.name for one in asked]
    numbers = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return tuple(
        Request(one, name if number == 1 else f"{name} {number}", settings)
        for one, name, number in zip(asked, names, numbers, strict=True)
    )
