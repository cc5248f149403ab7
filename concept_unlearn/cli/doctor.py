"""The verb that says what is missing or broken."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .app import AsJson, app, console, write_json

if TYPE_CHECKING:
    from ..doctor import Diagnosis

_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


@app.command()
def doctor(
    fast: Annotated[bool, typer.Option("--fast", help="Leave out whether every requirement can be imported.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at the installation, the device, the embedded model and the caches, and say how to mend what is broken.

    Changes nothing and asks no network. Exit code 1 where something that is needed is broken.
    """
    from ..doctor import diagnose

    found = diagnose(fast=fast)
    if as_json:
        write_json({"sound": found.sound, **found.model_dump()})
    else:
        _tell(found)
    if not found.sound:
        raise typer.Exit(1)


def _tell(diagnosis: Diagnosis) -> None:
    width = max(len(finding.name) for finding in diagnosis.findings)
    for group, findings in groupby(diagnosis.findings, key=lambda finding: finding.group):
        console.print(Text(group, "bold"))
        for finding in findings:
            state = (f"  {finding.state:<6}  ", _STYLES[finding.state])
            _line(Text.assemble(state, f"{finding.name:<{width}}  {finding.found}"))
            if finding.mend:
                _line(Text.assemble(" " * (width + 12), (finding.mend, "cyan")))
    n = len(diagnosis.broken)
    verdict = f"{n} thing{'' if n == 1 else 's'} to mend" if n else "everything that is needed is there"
    _line(Text(f"\n{verdict}", "bold red" if n else "bold green"))


def _line(line: Text) -> None:
    console.print(line, soft_wrap=True, highlight=False)
