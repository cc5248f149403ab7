"""Verbs that unlearn, and that measure what came of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidConfig, UnknownName
from .app import (
    AsJson,
    Model,
    Overrides,
    ScopeName,
    ScoreSpec,
    Settings,
    app,
    bars,
    console,
    parsed,
    quiet,
    say,
    write_json,
)

_BEGUN = "begun"
"""A file in a folder of work, by which it is known to be ours."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/ and the schema verb.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Unlearn a concept as a config says, compare, and write a report.

    A run that was stopped goes on where it was when it is started again.
    A method that cannot be made is listed, the others go on; exit status 1.
    """
    from ..report import Overview
    from ..run import execute, load_run

    wanted, reports = load_run(config, set_ or []), {}
    for name, run in wanted.runs.items():
        with quiet(), bars() as track:
            reports[name] = report = execute(run, tracker=track)
        if name:
            console.rule(name)
        console.print(report.table())
        say(f"\nreport: {run.output / 'report.html'}   patches: {run.output / 'patches'}")
    if len(reports) > 1:
        overview = Overview(reports)
        console.rule("all settings")
        console.print(overview.table())
        say(f"\noverview: {overview.save(wanted.output)}")
    if as_json:
        numbers = {name: report.as_json() for name, report in reports.items()}
        write_json(numbers.get("", numbers))
    if any(report.missing for report in reports.values()):
        raise typer.Exit(1)


@app.command()
def unlearn(
    scope: ScopeName,
    output: Annotated[Path, typer.Option(help="Folder for the patch.")],
    dictionary: Annotated[list[str], typer.Option(help="One or several, each edits its own site.")],
    model: Model = "smollm2",
    score: ScoreSpec = "selectivity",
    n: Annotated[int, typer.Option(help="Features of each dictionary.")] = 10,
    choice: Annotated[
        list[Path] | None, typer.Option(help="A choice.yaml that the inspect verb's page saved; one a dictionary.")
    ] = None,
    edit: Annotated[
        str, typer.Option(help="By name or as YAML, e.g. 'zero' or '{kind: clamp, to: -50}'.")
    ] = "{kind: clamp, to: {of_norm: -1.0}}",
    gate: Annotated[
        str, typer.Option(help="By name or as YAML, e.g. 'probe' or '{kind: sequence, alpha: 0.05}'.")
    ] = "always",
    keep: Annotated[float, typer.Option(help="Share of neighbouring accuracy that must stay.")] = 0.98,
    max_perplexity: Annotated[float, typer.Option(help="How much general perplexity may grow, as a factor.")] = 1.01,
    max_gibberish: Annotated[float, typer.Option(help="How many more replies in scope may be gibberish.")] = 0.05,
    grid: Annotated[int, typer.Option(help="Strengths to try from 0 to 1.")] = 11,
) -> None:
    """Make a calibrated patch from features of a dictionary and save it.

    It is made from one half of the scope, so that evaluate can report on the other.
    """
    from ..calibrate import RetainedUtility, strongest
    from ..data.scope import Scope
    from ..features import Choice
    from ..lm import LM
    from ..methods import Suppress

    _check_is_free(output)
    with quiet(), bars() as track:
        lm, tune = LM.load(model), Scope.load(scope).halves().tune
        method = Suppress.parse(
            {
                "kind": "suppress", "dictionaries": tuple(dictionary), "n": n, "score": parsed(score),
                "edit": parsed(edit), "gate": parsed(gate), "choices": [Choice.load(path) for path in choice or ()],
            }
        )  # fmt: skip
        with track("observe what must be kept", None) as progress:  # first, as it may say that nothing can be
            utility = RetainedUtility(
                lm, tune, keep=keep, max_perplexity=max_perplexity, max_gibberish=max_gibberish, progress=progress
            )
        with track("measure and select features", None) as progress:
            made = method(lm, tune, progress=progress)
        with track("calibrate", None) as utility.progress:
            strength = strongest(utility, made, grid=grid).strength
        patch = made.at(strength).met(lm, [p.text for p in tune.forget])
        patch.save(output, made=method.record(patch))
    say(f"{output}: strength {patch.strength:.3g}, {patch.n_bytes / 1024:.0f} KB")


@app.command()
def fit(
    method: Annotated[str, typer.Argument(help="A preset or kind (the list verb names them), or a YAML file.")],
    scope: ScopeName,
    output: Annotated[Path, typer.Option(help="Folder for the patch, and for checkpoints while it is made.")],
    model: Model = "smollm2",
    set_: Settings = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Use all retained text and probes; half of them are left for evaluate otherwise."),
    ] = False,
) -> None:
    """Make a patch by any method, as strong as it comes, and save it.

    A call that was stopped goes on to the same patch. Several processes share a training:
    accelerate launch -m concept_unlearn fit ...
    """
    from ..activations.processes import Processes
    from ..config import override, read_mapping
    from ..data.scope import Scope
    from ..lm import LM
    from ..methods import PRESETS, Finetune, Method, Study

    is_file = method.endswith((".yaml", ".yml"))
    if not is_file and method not in {*PRESETS, *Method.members}:
        raise UnknownName("method", method, {*PRESETS, *Method.members})
    named = {"preset": method} if method in PRESETS else {"kind": method}
    spec = read_mapping(Path(method)) if is_file else named
    for line in set_ or []:
        override(spec, line)
    made = Method.parse(spec)
    _check_is_free(output)
    with quiet(), bars() as track:
        lm, found = LM.load(model), Scope.load(scope)
        (output / "work").mkdir(parents=True, exist_ok=True)
        (output / "work" / _BEGUN).touch()
        if not whole:
            found = found.keeping_half()
        total = made.n_items(found) if isinstance(made, Finetune) else None
        with track(f"fit {method}", total) as progress:
            patch = made.fit(Study(lm, found, folder=output / "work", progress=progress))
        if Processes.here().rank == 0:
            patch.save(output, lm, made=made.record(patch))
            shutil.rmtree(output / "work", ignore_errors=True)
    say(f"{output}: a {patch.kind} patch of {patch.n_bytes / 2**20:.2g} MB")


def _check_is_free(output: Path) -> None:
    """Nothing but a patch of ours, or the work on one, may stand where a patch is to be put."""
    if output.exists() and not output.is_dir():
        raise InvalidConfig(f"{output} is a file: give a folder for the patch")
    entries = {path.name for path in output.iterdir()} if output.is_dir() else set()
    unfinished = {"work"} if (output / "work" / _BEGUN).is_file() else set()
    finished = {n for n in entries if n == "config.json" or (n.startswith("patch-") and n.endswith(".safetensors"))}
    if "config.json" in finished and "canary" not in (output / "config.json").read_text():
        finished = set()
    if foreign := sorted(entries - unfinished - finished):
        raise InvalidConfig(f"{output} holds something else ({foreign[0]}): give another folder for the patch")


@app.command()
def bake(
    patch: Annotated[Path, typer.Argument(help="Folder of a saved patch of weights.")],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    model: Model = "smollm2",
    strength: Annotated[float | None, typer.Option(help="The patch's own where not given.")] = None,
) -> None:
    """Write an ordinary checkpoint of a model with a patch in its weights."""
    from ..lm import LM
    from ..patches import WeightPatch, load_patch

    with quiet(), bars() as track, track("bake", None):
        lm = LM.load(model)
        loaded = load_patch(patch, lm)
        if not isinstance(loaded, WeightPatch):
            raise InvalidConfig(f"{patch} is a {loaded.kind} patch: it acts while the model runs, not in its weights")
        (loaded if strength is None else loaded.at(strength)).bake(lm, output)
    say(f"{output}: {lm.name} with {patch} in its weights")
