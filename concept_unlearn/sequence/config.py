"""A sequence's configuration: what is asked to be forgotten in which order, and by which method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..component import Frozen
from ..config import ModelSpec, load_config
from ..evaluation.benchmark import Benchmark
from ..methods import Method
from ..run.config import BenchmarkSpec, CalibrationSpec

Asked = Annotated[str | Benchmark, Field(union_mode="left_to_right")]
"""A scope by what it is loaded from, or a benchmark that holds what is to be forgotten."""


class SequenceRun(Frozen):
    """A sequence's configuration. Unknown keys are errors; every default is written out beside the result."""

    model: ModelSpec = ModelSpec()
    requests: tuple[Asked, ...] = Field(min_length=1)
    """In order. Of a scope methods learn from one half and the other is reported on."""
    method: Method
    fixed_reference: bool = False
    """Objectives compare with the model before the first request, not with the one that the last request left."""
    join: Literal["stack", "sum"] = "stack"
    """How the patches of all requests make one: laid over one another, or, of weights, added up."""
    calibration: CalibrationSpec | None = None
    """Every request's patch is set to the strength that keeps what the model before it had; none: full strength."""
    benchmark: BenchmarkSpec = BenchmarkSpec()
    """How scopes are asked."""
    output: Path = Path("runs/sequence")


def load_sequence(path: str | Path, overrides: Sequence[str] = ()) -> SequenceRun:
    """A YAML file with ``key.inner=value`` overrides. Raises InvalidConfig or UnknownName."""
    return load_config(SequenceRun, path, overrides)
