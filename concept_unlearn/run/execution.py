"""The main job: from a config to a calibrated patch and a report, each finished stage kept on disk.

A run directory holds the resolved config, the patches, ``summary.json``, ``rows.jsonl``, ``report.html`` and
the finished stages. A run that was stopped goes on with the stages that are missing, and gives what it would
have given. A stage is known by everything that can change it. A method that cannot be made is listed with the
reason, and the others go on; a dictionary that cannot be loaded ends the run before anything is made.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic_core import to_json

from ..activations.processes import Processes
from ..calibrate import RetainedMetric, RetainedUtility, strongest
from ..compare import Comparison
from ..component import Frozen, build
from ..data.scope import Scope
from ..errors import ConceptUnlearnError, InvalidConfig
from ..evaluation.benchmark import Benchmark
from ..evaluation.benchmarks import ConceptBenchmark
from ..evaluation.meter import Meter, metered
from ..files import write_atomically
from ..lm import LM
from ..lm.fingerprint import checksum
from ..methods import Method, Study
from ..patches import Patch, load_patch
from ..report import Entry, Report
from ..tracking import Tracker, silent
from .config import BenchmarkSpec, Run

T = TypeVar("T", bound=Frozen)

_KEY = 12
"""Digits of a stage's key."""


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
        entries, missing = self._entries()
        report = self.comparison.report(entries, self._provenance(time.perf_counter() - start), missing)
        if self.here.rank == 0:
            report.save(run.output)
        return report

    def _entries(self) -> tuple[list[Entry], dict[str, str]]:
        """What was made, and why the rest was not. Raises the first error where nothing was."""
        entries, failed = [], {}
        _ = self.comparison.base  # what is wrong with the benchmark is no method's fault
        for name, method, seed in self._jobs():
            try:
                entries.append(self._entry(name, method, seed))
            except ConceptUnlearnError as error:
                failed[_labelled(name, seed)] = error
        if failed and not entries:
            raise next(iter(failed.values()))
        return entries, {name: str(error) for name, error in failed.items()}

    @cached_property
    def _model(self) -> list[str]:
        return [self.lm.fingerprint, checksum(self.lm.model)]

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
        with self.track("measure features", n_passages) as progress, metered(self.lm) as self.shared:
            study.progress = progress
            dictionaries = {name for m in methods for name in m.reads[0]}
            for name in dictionaries:
                study.dictionary(name)
            sites = sorted({site for m in methods for site in m.reads[1]})
            with contextlib.suppress(ConceptUnlearnError):  # each then measures its own, and one of them says why
                study.measure(dictionaries, sites)
        return study

    def _jobs(self) -> Iterator[tuple[str, Method, int | None]]:
        """Every method, and each that draws anything once a seed."""
        for name, method in {self.run.name: self.run.method, **self.run.compare}.items():
            if self.run.seeds and "seed" in type(method).model_fields:
                yield from ((name, method.model_copy(update={"seed": seed}), seed) for seed in self.run.seeds)
            else:
                yield name, method, None

    def _entry(self, name: str, method: Method, seed: int | None) -> Entry:
        full = _labelled(name, seed)
        folder = self.run.output / "patches" / full
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
            patch = self._save(patch.at(calibrated.strength), folder, method)
        what |= {
            "benchmark": [self.benchmark.spec(), self.benchmark.digest],
            "attacks": {n: a.spec() for n, a in self.run.attacks.items()},
            "retrained": None
            if self.retrained is None
            else [checksum(self.retrained.model), str(self.retrained.dtype)],
        }

        def observe() -> Entry:
            return self.comparison.entry(
                name, patch, about=_about(method), seed=seed, curve=calibrated.curve, fit=Meter(**fitted.fit)  # type: ignore[arg-type]
            )  # fmt: skip

        return self._stage(f"entry-{full}", Entry, what, observe, _is_whole)

    def _fit(self, name: str, method: Method, folder: Path) -> Fitted:
        all_work = self.run.output / "work"
        key = hashlib.sha256(json.dumps(method.spec(), sort_keys=True).encode()).hexdigest()[:_KEY]
        study, work = self.study, all_work / f"{name}-{key}"  # what another setting has begun is not gone on from
        if self.run.calibration is not None:
            _ = self.utility  # where nothing can be kept, nothing needs to be made
        with self.track(f"make {name}", None) as progress, metered(self.lm) as meter:
            study.progress, study.folder = progress, work
            patch = method.fit(study)
        if self.here.rank == 0:  # the folder no longer holds what a former config put there
            for stale in self.stages.glob(f"fit-{glob.escape(name)}-{'[0-9a-f]' * _KEY}.json"):
                stale.unlink()
        self._save(patch, folder, method)
        if self.here.rank == 0:
            for begun in all_work.glob(f"{glob.escape(name)}-{'[0-9a-f]' * _KEY}"):
                shutil.rmtree(begun, ignore_errors=True)
        return Fitted(fit=asdict(meter.after(self.shared) if any(method.reads) else meter))

    def _save(self, patch: Patch, folder: Path, method: Method) -> Patch:
        met = patch.met(self.lm, [p.text for p in self.learned.forget])
        if self.here.rank == 0:
            met.save(folder, made=method.record(met))
        self.here.wait()
        return met

    def _calibrate(self, name: str, made: Patch) -> Calibrated:
        spec = self.run.calibration
        if spec is None:
            return Calibrated(strength=1.0)
        utility = self.utility
        with self.track(f"calibrate {name}", None) as utility.progress:
            found = strongest(utility, made, name=name, grid=spec.grid, tolerance=spec.tolerance)
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
        key = json.dumps([name, what, self._model, str(self.lm.dtype), _hash(self.learned), _version()], sort_keys=True)
        path = self.stages / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:_KEY]}.json"
        found = kind.model_validate_json(path.read_bytes()) if path.is_file() else None
        if found is not None and not holds(found):
            found = None
        self.here.wait()  # nobody writes before all have looked
        if found is None:
            found = make()
            if self.here.rank == 0:
                write_atomically(path, to_json(found, inf_nan_mode="strings"))
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


def _labelled(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}-seed{seed}"


def _hash(scope: Scope) -> str:
    content = {name: part for name, part in asdict(scope).items() if name != "source"}
    return hashlib.sha256(json.dumps(content, default=lambda e: e.model_dump()).encode()).hexdigest()


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
    return " + ".join(map(_short, value)) if isinstance(value, list) else str(value)


def _version() -> str:
    return importlib.metadata.version("concept-unlearn")
