"""Request after request on one model (A Closer Look at Machine Unlearning, arXiv 2410.08109, continual unlearning)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..calibrate import RetainedMetric, RetainedUtility, strongest
from ..component import Frozen
from ..data.scope import Scope
from ..errors import InvalidConfig
from ..evaluation.benchmark import Benchmark
from ..evaluation.measured import Measured
from ..files import write_atomically
from ..lm import LM
from ..lm.fingerprint import checksum
from ..methods import Method, Study
from ..patches import Patch, Stack, WeightPatch, load_patch, merge
from ..run.config import BenchmarkSpec, CalibrationSpec
from ..tracking import Tracker, silent
from .before import Before
from .config import SequenceRun
from .report import After, SequenceReport, gibberish, kept, told
from .request import Asked, Request, named
from .stages import Stages, digest

Join = Callable[[tuple[Patch, ...]], Patch]


def stack(patches: tuple[Patch, ...]) -> Patch:
    """Each over those before it; a single one as it is."""
    return patches[0] if len(patches) == 1 else Stack(patches)


def total(patches: tuple[Patch, ...]) -> Patch:
    """One change of weights, of several. Raises InvalidConfig for patches of another kind."""
    if odd := [p.kind for p in patches if not isinstance(p, WeightPatch)]:
        raise InvalidConfig(f"only changes of weights add up, and this method leaves a {odd[0]} patch: stack them")
    return merge([p for p in patches if isinstance(p, WeightPatch)], "sum")


class Fitted(Frozen):
    """A patch that lies in its folder, by its digest."""

    patch: str


class Calibrated(Frozen):
    strength: float


class Observed(Frozen):
    results: dict[str, Measured]


class Sequential:
    """``Sequential(lm, method, ["chess", "astronomy"]).report()``

    Request k starts from what request k-1 left: its patch is made with all patches before it on. It keeps nothing that
    was to be forgotten before, and nobody reads what comes after it. With a ``folder`` whatever is finished is kept,
    and a sequence that was stopped goes on.
    """

    def __init__(
        self,
        lm: LM,
        method: Method,
        requests: Sequence[Asked],
        *,
        fixed_reference: bool = False,
        join: Join = stack,
        calibration: CalibrationSpec | None = None,
        benchmark: BenchmarkSpec | None = None,
        folder: str | Path | None = None,
        tracker: Tracker = silent,
    ) -> None:
        """Training compares with what the last request left, or with the untouched model if ``fixed_reference``.
        ``join`` makes one patch of those of all requests so far. Raises InvalidConfig where nothing is asked.
        """
        if not requests:
            raise InvalidConfig("a sequence has at least one request")
        self.lm, self.method, self.fixed_reference, self.join, self.track = lm, method, fixed_reference, join, tracker
        self.requests, self.calibration = named(requests, benchmark or BenchmarkSpec()), calibration
        self.stages = Stages(
            None if folder is None else Path(folder), [lm.fingerprint, checksum(lm.model), str(lm.dtype)]
        )
        self._made: list[Patch] = []
        self._untouched: dict[str, dict[str, Measured]] = {}

    @classmethod
    def of(cls, run: SequenceRun, *, tracker: Tracker = silent) -> Sequential:
        """As a config says, in its output folder."""
        folder = run.output
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).encode())
        return cls(
            run.model.load(), run.method, run.requests, fixed_reference=run.fixed_reference,
            join=total if run.join == "sum" else stack, calibration=run.calibration, benchmark=run.benchmark,
            folder=folder, tracker=tracker,
        )  # fmt: skip

    def report(self) -> SequenceReport:
        """Every request served, and after each what is left of all so far."""
        rows = [self._after(n) for n in range(1, len(self.requests) + 1)]
        report = SequenceReport(
            model=self.lm.name, fingerprint=self.lm.fingerprint, method=self.method.spec(),
            fixed_reference=self.fixed_reference, told={r.name: told(r) for r in self.requests},
            untouched=self._before_all(), rows=tuple(rows),
        )  # fmt: skip
        if self.stages.folder is not None:
            if self.stages.here.rank == 0:
                report.save(self.stages.folder)
            self._save(self.patch(), self.stages.folder / "patch", [r.learned.forget[0].text for r in self.requests])
        return report

    def patch(self, n: int | None = None) -> Patch:
        """What the first n requests leave, all where None; each is served if it was not yet."""
        n = len(self.requests) if n is None else n
        while len(self._made) < n:
            self._made.append(self._serve(len(self._made)))
        return self.join(tuple(self._made[:n]))

    def _serve(self, k: int) -> Patch:
        request, previous = self.requests[k], self.patch(k) if k else None
        learned = request.learned.without(p for earlier in self.requests[:k] for p in earlier.whole.forget)
        what = {
            "method": self.method.spec(), "learned": digest(learned), "previous": previous and previous.digest,
            "fixed_reference": self.fixed_reference and previous is not None,
        }  # fmt: skip
        patch = self._fitted(_place(k, request), request, learned, previous, what)
        spec = self.calibration
        if spec is None:
            return patch

        def calibrate() -> Calibrated:
            with Before(self.lm, previous), self.track(f"calibrate {request.name}", None) as progress:
                utility = _utility(self.lm, request, learned, spec, progress)
                found = strongest(utility, patch, name=request.name, grid=spec.grid, tolerance=spec.tolerance)
            return Calibrated(strength=found.strength)

        what |= {"calibration": spec.model_dump(mode="json"), "on": (spec.benchmark or request.benchmark).digest}
        return patch.at(self.stages.kept(f"{_place(k, request)}/strength", Calibrated, what, calibrate).strength)

    def _fitted(self, place: str, request: Request, learned: Scope, previous: Patch | None, what: Any) -> Patch:
        """At full strength, on the model as the requests before have left it."""
        folder, made = self.stages.folder and self.stages.folder / place, list[Patch]()

        def fit() -> Fitted:
            work = folder and folder / f"work-{digest(what)[:8]}"
            with Before(self.lm, previous) as before, self.track(f"forget {request.name}", None) as progress:
                original = before.any_request if self.fixed_reference and previous else None
                patch = self.method.fit(Study(self.lm, learned, folder=work, progress=progress, original=original))
                made.append(patch)
                if folder:
                    self._save(patch, folder / "patch", [p.text for p in learned.forget])
            self.stages.clear(f"{place}/work-*")
            return Fitted(patch=patch.digest)

        def is_there(found: Fitted) -> bool:
            if folder and (folder / "patch/config.json").is_file():
                made.append(load_patch(folder / "patch"))
            return bool(made) and made[0].digest == found.patch

        self.stages.kept(f"{place}/patch", Fitted, what, fit, is_there)
        return made[-1]

    def _after(self, n: int) -> After:
        """What is left when n requests have been served."""
        patch, so_far, last = self.patch(n), self.requests[:n], self.requests[n - 1]
        for request in so_far:
            if request.name not in self._untouched:
                self._untouched[request.name] = self._observed(request, "nothing", "untouched", None)
        asked = {r.name: self._observed(r, last.name, f"{_place(n - 1, last)}/after", patch) for r in so_far}
        return After(
            request=last.name, strength=self._made[n - 1].strength, asked=asked,
            kept=kept(so_far, asked, self._untouched), gibberish=gibberish(so_far, asked),
        )  # fmt: skip

    def _before_all(self) -> After:
        asked = self._untouched
        return After(
            request="nothing", asked=asked, kept=kept(self.requests, asked, asked),
            gibberish=gibberish(self.requests, asked),
        )  # fmt: skip

    def _observed(self, request: Request, after: str, place: str, patch: Patch | None) -> dict[str, Measured]:
        benchmark, metrics = request.benchmark, request.metrics
        what = [
            None if patch is None else patch.digest,
            benchmark.digest,
            benchmark.spec(),
            [m.spec() for m in metrics],
        ]
        name = f"{place}/{_slug(request.name)}"

        def observe() -> Observed:
            folder = self.stages.folder and self.stages.folder / f"{name}-{digest(what)[:8]}"
            with self.track(f"ask about {request.name} after {after}", benchmark.n_steps(metrics)) as progress:
                view = benchmark.observe(self.lm, patch, metrics=metrics, folder=folder, progress=progress)
            return Observed(results=benchmark.measure(view, metrics))

        return self.stages.kept(name, Observed, what, observe).results

    def _save(self, patch: Patch, folder: Path, texts: Sequence[str]) -> None:
        is_there = (folder / "config.json").is_file() and load_patch(folder).digest == patch.digest
        self.stages.here.wait()  # nobody writes before all have looked
        if is_there:
            return
        met = patch.met(self.lm, texts)
        if self.stages.here.rank == 0:
            met.save(folder, made=self.method.record(met))
        self.stages.here.wait()


def _utility(
    lm: LM, request: Request, learned: Scope, spec: CalibrationSpec, progress: Any
) -> RetainedUtility | RetainedMetric:
    """What the model has that is to be kept, before this request is served."""
    if request.is_scope and spec.benchmark is None and spec.metric is None:
        settings = spec.model_dump(include={"max_perplexity", "max_gibberish", "max_probes", "max_passages"})
        keep = 0.98 if spec.keep is None else spec.keep
        return RetainedUtility(lm, learned, keep=keep, progress=progress, **settings)
    keep = 0.95 if spec.keep is None else spec.keep
    benchmark: Benchmark = spec.benchmark or request.benchmark
    return RetainedMetric(lm, benchmark, metric=spec.metric, keep=keep, progress=progress)


def _place(k: int, request: Request) -> str:
    """Where what serves a request lies."""
    return f"{k + 1}-{_slug(request.name)}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "request"
