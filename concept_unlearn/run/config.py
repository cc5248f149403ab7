"""A run's configuration: what is forgotten, by which methods, on which benchmark, at what retained utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, field_validator, model_validator

from ..component import Frozen, build
from ..config import ModelSpec, load_config
from ..errors import ConceptUnlearnError, InvalidConfig
from ..evaluation.attacks import Attack
from ..evaluation.benchmark import Benchmark
from ..evaluation.protocol import attacks_of, calibration_of
from ..methods import Method


class CalibrationSpec(Frozen):
    keep: float | None = Field(None, gt=0, le=1)
    """Share of what must be kept that must stay: of the neighbouring probes' accuracy (0.98 where not given), or of
    ``metric`` (0.95).
    """
    metric: str | None = None
    """Of ``benchmark``, higher where more is kept; by default the one that the benchmark itself keeps. One without a
    set, such as ``probability``, is of the set that it keeps.
    """
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


_BY_NAME = ("compare", "attacks")

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
    """None leaves every patch at full strength; ``uwc`` keeps extraction strength, as Unlearning with Control does."""
    benchmark: Judge = Field(BenchmarkSpec(), union_mode="left_to_right")
    """Any benchmark, or settings of the concept benchmark, which reports on one half of the scope."""
    attacks: dict[str, Attack] = Field(default_factory=dict)
    """What every method has to stand, by name; or ``survey``, for those of a protocol."""
    retrained: ModelSpec | None = None
    """A model that never saw what is to be forgotten, from which every gap is taken."""
    seeds: tuple[int, ...] = ()
    """Methods that draw anything are made once for each; the method's own seed where empty."""
    output: Path = Path("runs/run")
    settings: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """The same methods in several settings, by name: keys of this config to put in place there. Methods and attacks are
    added to (``compare: {npo: null}`` leaves one out); each setting has a folder of its own in ``output``, and one that
    is null is left out.
    """

    @field_validator("benchmark", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        named = isinstance(value, str) or (isinstance(value, dict) and "kind" in value)
        return Benchmark.parse(value) if named else build(BenchmarkSpec, value) if isinstance(value, dict) else value

    @field_validator("attacks", mode="before", json_schema_input_type=dict[str, Attack] | Literal["survey"])
    @classmethod
    def _named_attacks(cls, value: Any) -> Any:
        return attacks_of(value) if isinstance(value, str) else value

    @field_validator("calibration", mode="before", json_schema_input_type=CalibrationSpec | Literal["uwc"] | None)
    @classmethod
    def _named_calibration(cls, value: Any) -> Any:
        return calibration_of(value) if isinstance(value, str) else value

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
        for name in self.settings:
            if not name or "/" in name:
                raise InvalidConfig(f"a setting's name is a folder's, without a '/'; given: {name!r}")
        _ = self.runs
        return self

    @property
    def runs(self) -> dict[str, Run]:
        """A run for each setting; the run itself, under no name, where there is none."""
        settings = {name: own for name, own in self.settings.items() if own is not None}
        if not settings:
            return {"": self}
        common = self.model_dump(mode="json", exclude={"settings", "output"})
        found = {}
        for name, own in settings.items():
            if odd := [key for key in own if key in ("settings", "output")]:
                raise InvalidConfig(f"settings.{name}: a setting has no {odd[0]!r} of its own")
            try:
                found[name] = build(Run, _overlaid(common, own) | {"output": self.output / name})
            except ConceptUnlearnError as error:
                raise InvalidConfig(f"settings.{name}: {error}") from None
        return found


def _overlaid(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` over ``common``: mappings of names key by key, components and all else as a whole."""
    found = dict(common)
    for key, value in own.items():
        below = found.get(key)
        if key in _BY_NAME and isinstance(value, dict) and isinstance(below, dict):
            merged = {**below, **value}
            found[key] = {name: inner for name, inner in merged.items() if inner is not None}
        else:
            found[key] = value
    return found


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A YAML file with ``key.inner=value`` overrides. Raises InvalidConfig or UnknownName."""
    return load_config(Run, path, overrides)
