"""The verb that opens the live page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Model, app, quiet, say


@app.command()
def ui(
    patch: Annotated[list[str], typer.Option(help="Folder or Hub id of a saved patch. Repeatable.")],
    model: Model = "smollm2",
    inspection: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that inspect made of the same dictionary: it names features."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs whose reports are listed.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in: there is no password.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in this machine's browser.")] = True,
) -> None:
    """Talk to a model and its patched self side by side, in a browser.

    Turn the patch's strength, gate and features, see which tokens it acts on, and read the reports of runs.
    """
    from ..features import Inspection
    from ..lm import LM
    from ..ui import Stage, check_installed, listen, load_patches, serve

    check_installed()
    with listen(host, port) as taken, quiet():
        seen = [Inspection.load(folder) for folder in inspection or ()]
        lm = LM.load(model)
        stage = Stage(lm, load_patches(patch, lm), seen)
        serve(stage, runs=runs, taken=taken, browser=browser, say=lambda at: say(f"page: {at}   (Ctrl+C ends it)"))
