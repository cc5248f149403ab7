"""The verb that runs tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .app import Model, app, console, quiet, say

if TYPE_CHECKING:
    from ..evaluation.harness import Change


@app.command()
def lm_eval(
    tasks: Annotated[str, typer.Option(help="Tasks, groups, tags or .yaml files, with commas between; * is allowed.")],
    patch: Annotated[
        list[Path] | None, typer.Option(help="A saved patch's folder. Repeatable: each is compared with the model.")
    ] = None,
    model: Model = "smollm2",
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    limit: Annotated[float | None, typer.Option(help="So many documents of each task, or below 1 a share.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; else the task's own.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "8",
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as a user would.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for results in lm-eval's own format.")] = None,
    any_base: Annotated[
        bool, typer.Option(help="Accept a patch of another base if its canary says it still works.")
    ] = False,
) -> None:
    """Run any task of lm-eval with and without a patch; without one, on the model alone.

    pip install lm_eval. Its own command knows patched models as well:
    python -m concept_unlearn.evaluation.harness --model concept_unlearn --model_args pretrained=...,patch=...
    """
    from ..component import build
    from ..evaluation.harness import Harness, changes
    from ..lm import LM
    from ..patches import Stack, load_patch

    harness = build(
        Harness,
        {
            "tasks": tuple(name.strip() for name in tasks.split(",") if name.strip()), "include_path": include_path,
            "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template,
            "batch_size": int(batch_size) if batch_size.isdecimal() else batch_size,
        },
    )  # fmt: skip
    with quiet():
        _ = harness.names  # what is wrong with them is said before the model is loaded
        lm = LM.load(model)
        patches = {
            name: load_patch(path, lm, any_base=any_base)
            for name, path in (zip(_names(patch), patch, strict=True) if patch else ())
        }
        # an empty stack: the same passes as with a patch, so that a difference is the patch's
        before = harness(lm, Stack(()) if patches else None, folder=output and output / "before")
        after = {
            name: harness(lm, loaded, folder=output and output / "after" / name, about={"patch": name})
            for name, loaded in patches.items()
        }
    if before is None:
        return
    alone = changes(before, before)
    console.print(_table(alone, {name: changes(before, results) for name, results in after.items() if results}))
    if output:
        say(f"\nresults: {output}")


def _names(paths: list[Path]) -> list[str]:
    """Of patches' folders: the last part, and as much before it as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next((n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["-".join(p[-depth:]) for p in parts]


def _table(before: list[Change], after: Mapping[str, list[Change]]) -> Table:
    table = Table("task", "metric")
    for column in ("before" if after else "value", *(c for name in after for c in (f"after {name}", "difference"))):
        table.add_column(column, justify="right")
    rows = {name: {(c.task, c.metric): c for c in found} for name, found in after.items()}
    for row in before:
        cells = [_shown(row.before, row.before_stderr)]
        for found in rows.values():
            change = found.get((row.task, row.metric))
            cells += ["", ""] if change is None else [
                _shown(change.after, change.after_stderr), _shown(change.difference, change.stderr, sign="+")
            ]  # fmt: skip
        table.add_row(row.task, row.metric, *cells)
    return table


def _shown(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
