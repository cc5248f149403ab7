"""The verb that serves requests to forget which come one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Overrides, app, bars, console, quiet, say


@app.command()
def sequence(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/sequence.yaml and the schema verb.")],
    set_: Overrides = None,
) -> None:
    """Forget one thing after another, and see after each what is left of all.

    A sequence that was stopped goes on where it was when it is started again.
    """
    from ..sequence import Sequential, load_sequence

    wanted = load_sequence(config, set_ or [])
    with quiet(), bars() as track:
        report = Sequential.of(wanted, tracker=track).report()
    console.print(report.table())
    say(f"\nreport: {wanted.output / 'sequence.md'}   patch: {wanted.output / 'patch'}")
