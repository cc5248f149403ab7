"""The main job: from a config to a calibrated patch and a report, each finished stage kept on disk.

A run directory holds the resolved config, the patches, ``summary.json``, ``rows.jsonl``, ``report.html`` and
the finished stages. A run that was stopped goes on with the stages that are missing, and gives what it would
have given. A stage is known by everything that can change it.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import Field, PlainSerializer, field_validator, model_validator

from .activations.processes import Processes
from .calibrate import RetainedMetric, RetainedUtility, find_strength
from .compare import Comparison
from .component import Frozen, build
from .config import ModelSpec, load_config
from .data.scope import Scope
from .errors import InvalidConfig
from .evaluation.attacks import Attack
from .evaluation.benchmark import Benchmark
from .evaluation.benchmarks import ConceptBenchmark
from .evaluation.meter import Meter, metered
from .files import write_atomically
from .lm import LM
from .methods import Method, Study
from .patches import Patch, load_patch
from .report import Entry, Report
from .tracking import Tracker, silent

T = TypeVar("T", bound=Frozen)

_CANARIES = 6
_KEY = 12
"""Digits of a stage's key."""


class CalibrationSpec(Frozen):
    keep: float | None = Field(None, gt=0, le=1)
    """Share of what must be kept that must stay: of the neighbouring probes' accuracy (0.98 where not given), or of
    ``metric`` (0.95).
    """
    metric: str | None = None
    """Of ``benchmark``, higher where more is kept; by default the one that the benchmark itself keeps."""
    benchmark: Benchmark | None = None
    """What to calibrate on, apart from what is reported. A run on a concept has the tuning half of its scope."""
    max_perplexity: float = 1.01
    """How much general perplexity may grow, as a factor."""
    max_gibberish: float = 0.05
    """How much the share of gibberish among replies in scope may grow."""
    grid: int = 21
    tolerance: float = 0.005
    max_probes: int | None = None
    max_passages: int = 24


class BenchmarkSpec(Frozen):
    """The concept benchmark on the reporting half of the run's own scope."""

    max_probes: int | None = None
    """Of each set; none means all."""
    max_passages: int = 24
    max_tokens: int = 96
    batch_size: int = 32


Judge = Annotated[
    BenchmarkSpec | Benchmark,
    PlainSerializer(lambda judge: judge.spec() if isinstance(judge, Benchmark) else judge.model_dump(mode="json")),
]


class Run(Frozen):
    """A run's configuration. Unknown keys are errors; every default is written out beside the result."""

    model: ModelSpec = ModelSpec()
    scope: str | None = None
    """A built-in concept, a folder, a .jsonl file or a dataset id; what the benchmark holds where not given."""
    name: str = "sae"
    """What the method is called in the report."""
    method: Method
    compare: dict[str, Method] = Field(default_factory=dict)
    """Other methods to stand beside it, by name."""
    calibration: CalibrationSpec | None = CalibrationSpec()
    """None leaves every patch at full strength."""
    benchmark: Judge = Field(BenchmarkSpec(), union_mode="left_to_right")
    """Any benchmark, or settings of the concept benchmark, which reports on one half of the scope."""
    attacks: dict[str, Attack] = Field(default_factory=dict)
    """What every method has to stand, by name."""
    retrained: ModelSpec | None = None
    """A model that never saw what is to be forgotten, from which every gap is taken."""
    seeds: tuple[int, ...] = ()
    """Methods that draw anything are made once for each; the method's own seed where empty."""
    output: Path = Path("runs/run")

    @field_validator("benchmark", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        named = isinstance(value, str) or (isinstance(value, dict) and "kind" in value)
        return Benchmark.parse(value) if named else build(BenchmarkSpec, value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.name in self.compare:
            raise InvalidConfig(
                f"two methods are called {self.name!r}: give the run another name, or that one in compare"
            )
        if odd := [name for name in (self.name, *self.compare) if "/" in name]:
            raise InvalidConfig(f"a method's name is a folder's, without a '/'; given: {odd[0]!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise InvalidConfig(f"seeds are different numbers; given: {', '.join(map(str, self.seeds))}")
        spec = self.calibration
        if spec and spec.metric and not spec.benchmark and isinstance(self.benchmark, BenchmarkSpec):
            raise InvalidConfig(
                f"calibration.metric ({spec.metric}) goes with a benchmark; a scope is kept by its probes and passages"
            )
        return self


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A YAML file with ``key.inner=value`` overrides. Raises InvalidConfig or UnknownName."""
    return load_config(Run, path, overrides)


def execute(run: Run, *, tracker: Tracker | None = None) -> Report:
    """Everything that is not done yet. The report is saved in ``run.output`` and returned."""
    return _Execution(run, tracker or silent).report()


class Fitted(Frozen):
    """What making a patch took; it lies in its folder, at full strength until it is calibrated."""

    fit: dict[str, int | float]


class Calibrated(Frozen):
    """The strength that a patch was set to, and what was tried on the way."""

    strength: float
    curve: tuple[tuple[float, float], ...] = ()


class _Execution:
    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.run, self.track, self.here = run, tracker, Processes.here()
        self.lm = run.model.load()
        if isinstance(run.benchmark, BenchmarkSpec):
            if run.scope is None:
                raise InvalidConfig("a run has a scope, or a benchmark that holds what is to be forgotten")
            self.scope = Scope.load(run.scope)
            self.learned = self.scope.halves().tune
            settings = {"scope": self.scope, "half": "test", **run.benchmark.model_dump()}
            self.benchmark: Benchmark = build(ConceptBenchmark, settings)
        else:
            self.benchmark = run.benchmark
            found = self.benchmark.request if run.scope is None else Scope.load(run.scope)
            if found is None:
                raise InvalidConfig(f"the {self.benchmark.kind} benchmark holds no scope of its own: give the run one")
            self.scope = self.learned = found
        self.stages = run.output / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)

    def report(self) -> Report:
        start, run = time.perf_counter(), self.run
        if self.here.rank == 0:
            config = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
            write_atomically(run.output / "config.yaml", config.encode())
        entries = [self._entry(*job) for job in self._jobs()]
        report = self.comparison.report(entries, self._provenance(time.perf_counter() - start))
        if self.here.rank == 0:
            report.save(run.output)
        return report

    @cached_property
    def comparison(self) -> Comparison:
        run = self.run
        return Comparison(
            self.lm, self.benchmark, attacks=run.attacks, scope=self.learned, folder=run.output, tracker=self.track,
            retrained=self.retrained,
        )  # fmt: skip

    @cached_property
    def retrained(self) -> LM | None:
        return None if self.run.retrained is None else self.run.retrained.load()

    @cached_property
    def study(self) -> Study:
        """Made, with one pass for what all methods read, only if a stage asks for it."""
        methods = [self.run.method, *self.run.compare.values()]
        n_passages = sum(len(getattr(self.learned, name)) for name in ("forget", "near", "retain"))
        study = Study(self.lm, self.learned)
        with self.track("measure features", n_passages) as progress:
            study.progress = progress
            study.measure(
                {name for m in methods for name in m.reads[0]}, sorted({site for m in methods for site in m.reads[1]})
            )
        return study

    def _jobs(self) -> Iterator[tuple[str, Method, int | None]]:
        """Every method, and each that draws anything once a seed."""
        for name, method in {self.run.name: self.run.method, **self.run.compare}.items():
            if self.run.seeds and "seed" in type(method).model_fields:
                yield from ((name, method.model_copy(update={"seed": seed}), seed) for seed in self.run.seeds)
            else:
                yield name, method, None

    def _entry(self, name: str, method: Method, seed: int | None) -> Entry:
        full = name if seed is None else f"{name}-seed{seed}"
        folder = self.run.output / ("patch" if full == self.run.name else f"patches/{full}")
        spec = self.run.calibration
        what: dict[str, Any] = {"method": method.spec()}
        fitted = self._stage(
            f"fit-{full}", Fitted, what, lambda: self._fit(full, method, folder), lambda _: folder.is_dir()
        )
        patch = load_patch(folder)
        what |= {
            "calibration": spec and spec.model_dump(mode="json"),
            "on": spec and (spec.benchmark or self.benchmark).digest,
        }
        calibrated = self._stage(f"strength-{full}", Calibrated, what, lambda: self._calibrate(full, patch.at(1.0)))
        if patch.strength != calibrated.strength:
            patch = self._save(patch.at(calibrated.strength), folder)
        what |= {
            "benchmark": [self.benchmark.spec(), self.benchmark.digest],
            "attacks": {n: a.spec() for n, a in self.run.attacks.items()},
            "retrained": None if self.retrained is None else [self.retrained.fingerprint, str(self.retrained.dtype)],
        }

        def observe() -> Entry:
            return self.comparison.entry(
                name, patch, about=_about(method), seed=seed, curve=calibrated.curve, fit=Meter(**fitted.fit)  # type: ignore[arg-type]
            )  # fmt: skip

        return self._stage(f"entry-{full}", Entry, what, observe, _is_whole)

    def _fit(self, name: str, method: Method, folder: Path) -> Fitted:
        study, work = self.study, self.run.output / "work" / name
        with self.track(f"make {name}", None) as progress, metered(self.lm) as meter:
            study.progress, study.folder = progress, work
            patch = method.fit(study)
        if self.here.rank == 0:  # the folder no longer holds what a former config put there
            for stale in self.stages.glob(f"fit-{glob.escape(name)}-{'[0-9a-f]' * _KEY}.json"):
                stale.unlink()
        self._save(patch, folder)
        if self.here.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        return Fitted(fit=asdict(meter))

    def _save(self, patch: Patch, folder: Path) -> Patch:
        met = patch.met(self.lm, [p.text for p in self.learned.forget[:_CANARIES]])
        if self.here.rank == 0:
            met.save(folder)
        self.here.wait()
        return met

    def _calibrate(self, name: str, made: Patch) -> Calibrated:
        spec = self.run.calibration
        if spec is None:
            return Calibrated(strength=1.0)
        utility = self.utility
        with self.track(f"calibrate {name}", None) as utility.progress:
            found = find_strength(lambda s: utility(made.at(s)), grid=spec.grid, tolerance=spec.tolerance)
        return Calibrated(strength=found.strength, curve=found.curve)

    @cached_property
    def utility(self) -> RetainedUtility | RetainedMetric:
        """What is to be kept, and how much of it the untouched model has: the same for every method."""
        spec = self.run.calibration
        assert spec is not None
        with self.track("observe what must be kept", None) as progress:
            if isinstance(self.run.benchmark, BenchmarkSpec) and spec.benchmark is None:
                settings = spec.model_dump(include={"max_perplexity", "max_gibberish", "max_probes", "max_passages"})
                keep = 0.98 if spec.keep is None else spec.keep
                return RetainedUtility(self.lm, self.learned, keep=keep, progress=progress, **settings)
            return RetainedMetric(
                self.lm, spec.benchmark or self.benchmark, metric=spec.metric,
                keep=0.95 if spec.keep is None else spec.keep, progress=progress,
            )  # fmt: skip

    def _stage(
        self, name: str, kind: type[T], what: Any, make: Callable[[], T], holds: Callable[[T], bool] = lambda _: True
    ) -> T:
        """``make()``, or what it made when the same was asked before, if that still ``holds``."""
        key = json.dumps(
            [name, what, self.lm.fingerprint, str(self.lm.dtype), _hash(self.learned), _version()], sort_keys=True
        )
        path = self.stages / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:_KEY]}.json"
        found = kind.model_validate_json(path.read_bytes()) if path.is_file() else None
        if found is not None and not holds(found):
            found = None
        self.here.wait()  # nobody writes before all have looked
        if found is None:
            found = make()
            if self.here.rank == 0:
                write_atomically(path, found.model_dump_json().encode())
        return found

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
            "scope_sha256": _hash(self.scope),
            "examples": {name: len(asked.examples) for name, asked in self.benchmark.sets.items()},
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "seconds": round(seconds, 1),
        }


def _hash(scope: Scope) -> str:
    return hashlib.sha256(json.dumps(asdict(scope), default=lambda e: e.model_dump()).encode()).hexdigest()


def _is_whole(entry: Entry) -> bool:
    """Attacks that could not be tried are tried again."""
    return not any(outcome.skipped for outcome in entry.attacks.values())


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
