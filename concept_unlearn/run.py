"""The main job: from a config to a calibrated patch and a report, each finished stage kept on disk.

A run directory holds the resolved config, the patches, ``summary.json``, ``rows.jsonl``, ``report.html`` and
the finished stages. A run that was stopped goes on with the stages that are missing, and gives what it would
have given. A stage is known by everything that can change it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field

from .calibrate import Calibration, RetainedUtility, find_strength
from .compare import observe
from .component import Frozen
from .config import ModelSpec, load_config
from .data.scope import Scope
from .evaluation.concept import ConceptBenchmark, Rows
from .evaluation.cost import Cost
from .files import write_atomically
from .methods import Method, Study
from .patches import Patch
from .report import Entry, Report
from .tracking import Tracker, silent

T = TypeVar("T")


class CalibrationSpec(Frozen):
    keep: float = 0.98
    """Share of the neighbouring probes' accuracy that must stay."""
    max_perplexity: float = 1.01
    """How much general perplexity may grow, as a factor."""
    max_gibberish: float = 0.05
    """How much the share of gibberish among replies in scope may grow."""
    grid: int = 21
    tolerance: float = 0.005
    max_probes: int | None = None
    max_passages: int = 24


class BenchmarkSpec(Frozen):
    max_probes: int | None = None
    """Of each set; none means all."""
    max_passages: int = 24
    max_tokens: int = 96
    batch_size: int = 32


class Run(Frozen):
    """A run's configuration. Unknown keys are errors; every default is written out beside the result."""

    model: ModelSpec = ModelSpec()
    scope: str
    """A built-in concept, a folder, a .jsonl file or a dataset id."""
    name: str = "sae"
    """What the method is called in the report."""
    method: Method
    compare: dict[str, Method] = Field(default_factory=dict)
    """Other methods to stand beside it, by name."""
    calibration: CalibrationSpec | None = CalibrationSpec()
    """None leaves every patch at full strength."""
    benchmark: BenchmarkSpec = BenchmarkSpec()
    output: Path = Path("runs/run")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A YAML file with ``key.inner=value`` overrides. Raises InvalidConfig or UnknownName."""
    return load_config(Run, path, overrides)


def execute(run: Run, *, tracker: Tracker | None = None) -> Report:
    """Everything that is not done yet. The report is saved in ``run.output`` and returned."""
    return _Execution(run, tracker or silent).report()


class _Execution:
    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.run, self.track = run, tracker
        self.lm = run.model.load()
        self.scope = Scope.load(run.scope)
        self.tune, self.test = self.scope.halves()
        self.benchmark = ConceptBenchmark(self.test, **run.benchmark.model_dump())
        self.stages = run.output / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)

    def report(self) -> Report:
        start = time.perf_counter()
        run = self.run
        write_atomically(
            run.output / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).encode()
        )
        base = self._stage("base", Rows, run.benchmark.model_dump(), self._observe_base)
        methods = {run.name: run.method, **run.compare}
        entries = tuple(self._entry(name, method) for name, method in methods.items())
        report = Report(self.lm.name, self.benchmark, base, entries, self._provenance(time.perf_counter() - start))
        report.save(run.output)
        return report

    @cached_property
    def study(self) -> Study:
        """Made, with one pass for what all methods read, only if a stage asks for it."""
        methods = [self.run.method, *self.run.compare.values()]
        n_passages = sum(len(getattr(self.tune, name)) for name in ("forget", "near", "retain"))
        study = Study(self.lm, self.tune)
        with self.track("measure features", n_passages) as progress:
            study.progress = progress
            study.measure(
                {name for m in methods for name in m.reads[0]}, sorted({site for m in methods for site in m.reads[1]})
            )
        return study

    def _observe_base(self) -> Rows:
        with self.track("evaluate the untouched model", self.benchmark.n_steps) as progress:
            return self.benchmark.observe(self.lm, progress=progress)

    def _entry(self, name: str, method: Method) -> Entry:
        what = {
            "method": method.spec(),
            "calibration": self.run.calibration and self.run.calibration.model_dump(),
            "benchmark": self.run.benchmark.model_dump(),
        }
        folder = self.run.output / ("patch" if name == self.run.name else f"patches/{name}")
        stored = self._stage(f"patch-{name}", StoredEntry, what, lambda: self._make(name, method, folder), needs=folder)
        return stored.entry(name)

    def _make(self, name: str, method: Method, folder: Path) -> StoredEntry:
        study = self.study
        work = self.run.output / "work" / name
        with self.track(f"make {name}", None) as progress:
            study.progress, study.folder = progress, work
            patch = method.fit(study)
        found = self._calibrate(name, patch)
        patch = patch.at(found.strength if found else patch.strength)
        patch = patch.met(self.lm, [p.text for p in self.tune.forget[:6]])
        patch.save(folder)
        with self.track(f"evaluate {name}", self.benchmark.n_steps) as progress:
            entry = observe(
                self.lm,
                name,
                patch,
                self.benchmark,
                curve=found.curve if found else (),
                about=_about(method),
                progress=progress,
            )
        shutil.rmtree(work, ignore_errors=True)
        return StoredEntry(
            rows=entry.rows, strength=entry.strength, curve=entry.curve, cost=entry.cost._asdict(), about=entry.about
        )

    def _calibrate(self, name: str, patch: Patch) -> Calibration | None:
        spec = self.run.calibration
        if spec is None:
            return None
        utility = self.utility
        with self.track(f"calibrate {name}", None) as utility.progress:
            return find_strength(lambda s: utility(patch.at(s)), grid=spec.grid, tolerance=spec.tolerance)

    @cached_property
    def utility(self) -> RetainedUtility:
        """What is to be kept, and how much of it the untouched model has: the same for every method."""
        spec = self.run.calibration
        assert spec is not None
        with self.track("observe what must be kept", None) as progress:
            return RetainedUtility(
                self.lm, self.tune, progress=progress, **spec.model_dump(exclude={"grid", "tolerance"})
            )

    def _stage(self, name: str, kind: type[T], what: Any, make: Callable[[], T], needs: Path | None = None) -> T:
        """``make()``, or what it made when the same was asked before, if what it ``needs`` is still there."""
        key = json.dumps(
            [name, what, self.lm.fingerprint, str(self.lm.dtype), self._scope_hash, _version()], sort_keys=True
        )
        path = self.stages / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        if path.is_file() and (needs is None or needs.is_dir()):
            return kind.model_validate_json(path.read_bytes())  # type: ignore[attr-defined,no-any-return]
        made = make()
        write_atomically(path, made.model_dump_json().encode())  # type: ignore[attr-defined]
        return made

    @cached_property
    def _scope_hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self.scope), default=lambda e: e.model_dump()).encode()).hexdigest()

    def _provenance(self, seconds: float) -> dict[str, Any]:
        packages = ("concept-unlearn", "torch", "transformers", "sae-lens", "transformer-lens")
        return {
            "config": self.run.model_dump(mode="json"),
            "model": {
                "name": self.lm.name,
                "fingerprint": self.lm.fingerprint,
                "dtype": str(self.lm.dtype).removeprefix("torch."),
            },
            "device": str(self.lm.device),
            "scope_sha256": self._scope_hash,
            "examples": {name: len(rows) for name, rows in self.test.probes.items()},
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "seconds": round(seconds, 1),
        }


class StoredEntry(Frozen):
    """An entry of the report as a finished stage keeps it."""

    rows: Rows
    strength: float
    curve: tuple[tuple[float, float], ...]
    cost: dict[str, float]
    about: str

    def entry(self, name: str) -> Entry:
        cost = Cost(int(self.cost["n_bytes"]), int(self.cost["n_parameters"]), self.cost["latency"])
        return Entry(name, self.rows, self.strength, self.curve, cost, self.about)


def _about(method: Method) -> str:
    """The method's spec on one line, without what is at its default."""
    given = method.model_dump(mode="json", exclude_defaults=True)
    return f"{method.kind}: " + ", ".join(f"{key} {_short(value)}" for key, value in given.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{k} {_short(v)}" for k, v in value.items() if k != "kind" and v is not None)
        return f"{value.get('kind', '')}({inner})" if inner else str(value.get("kind", ""))
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version() -> str:
    return importlib.metadata.version("concept-unlearn")
