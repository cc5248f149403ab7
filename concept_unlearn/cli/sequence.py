"""The verb that serves requests to forget which come one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import AsJson, Overrides, app, bars, present, quiet, say


@app.command()
def sequence(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/sequence.yaml and the schema verb.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Forget one thing after another, and see after each what is left of all.

    A sequence that was stopped goes on where it was when it is started again.
    """
    from ..sequence import Sequential, load_sequence

    wanted = load_sequence(config, set_ or [])
    with quiet(), bars() as track:
        report = Sequential.of(wanted, tracker=track).report()
    present(report, report.table(), as_json=as_json)
    say(f"\nreport: {wanted.output / 'sequence.md'}   patch: {wanted.output / 'patch'}")
