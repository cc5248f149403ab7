"""Verbs that judge: how much was forgotten and kept, what survives an attack, and one method beside another."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import InvalidConfig
from .app import AsJson, Model, Settings, app, bars, parsed, present, quiet, say

if TYPE_CHECKING:
    from ..compare import Unlearned
    from ..data.scope import Scope
    from ..evaluation.attacks import Attack, Outcome
    from ..evaluation.benchmark import Benchmark
    from ..lm import LM
    from ..report import Report

Scoped = Annotated[
    str | None,
    typer.Option("--scope", help="A built-in concept, a folder, a .jsonl file or a dataset id; its reporting half."),
]
Judged = Annotated[
    str | None,
    typer.Option(
        "--benchmark",
        help="Instead of the scope's own, by name or as YAML, e.g. '{kind: tofu, data: tofu/, forget: forget01}'.",
    ),
]
Patches = Annotated[
    list[Path] | None, typer.Option("--patch", help="A saved patch's folder. Repeatable; the first leads.")
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="A model that was changed for good, as --model takes it. Repeatable."),
]
AnyBase = Annotated[bool, typer.Option(help="Accept a patch of another base if its canary says it still works.")]


@app.command()
def evaluate(
    scope: Scoped = None,
    benchmark: Judged = None,
    patch: Patches = None,
    checkpoint: Checkpoints = None,
    model: Model = "smollm2",
    retrained: Annotated[str | None, typer.Option(help="A model that never saw what is to be forgotten.")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="To stand, by name or as YAML, e.g. '{kind: relearn, steps: 20}'. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report, and for records as they come: started again it goes on.")
    ] = None,
    max_probes: Annotated[int | None, typer.Option(help="Of each set of a scope; all where not given.")] = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Measure saved patches, checkpoints, or a model alone, on the reporting half of a scope or on any benchmark."""
    from ..compare import Comparison
    from ..lm import LM

    with quiet(), bars() as track:
        judge, lm = _benchmark(scope, benchmark, max_probes), LM.load(model)
        comparison = Comparison(
            lm, judge, attacks=_attacks(attack or ()), scope=_request(judge, scope), folder=output, tracker=track,
            retrained=None if retrained is None else LM.load(retrained),
        )  # fmt: skip
        unlearned = _unlearned(lm, patch or (), checkpoint or (), any_base=any_base)
        report = comparison.report([comparison.entry(name, one) for name, one in unlearned.items()])
    _show(report, output, as_json=as_json)


@app.command()
def attack(
    attacks: Annotated[
        list[str], typer.Argument(help="By name or as YAML, e.g. '{kind: relearn, steps: 20}'; see list.")
    ],
    scope: Scoped = None,
    benchmark: Judged = None,
    patch: Patches = None,
    checkpoint: Checkpoints = None,
    model: Model = "smollm2",
    output: Annotated[Path | None, typer.Option(help="Folder for finished attacks: started again it goes on.")] = None,
    max_probes: Annotated[int | None, typer.Option(help="Of each set of a scope; all where not given.")] = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Show what attacks get out of a model that was made to forget, beside what they get out of the untouched one."""
    from ..evaluation.attacks import attack as run
    from ..lm import LM

    chosen = _attacks(attacks)
    with quiet(), bars() as track:
        judge, lm = _benchmark(scope, benchmark, max_probes), LM.load(model)
        request = _request(judge, scope)
        if request is None:
            raise InvalidConfig(
                f"attacks need to know what was forgotten; the {judge.kind} benchmark does not hold it: add --scope"
            )
        clean, found = {}, {}
        for name, one in {"untouched": lm, **_unlearned(lm, patch or (), checkpoint or (), any_base=any_base)}.items():
            own, active = (one, None) if isinstance(one, LM) else (lm, one)
            with track(f"attack {name}", None) as progress:
                view = judge.observe(own, active, metrics=judge.leaks, progress=progress)
                clean[name] = judge.measure(view, judge.leaks)
                found[name] = run(own, active, judge, request, chosen, folder=output, progress=progress)
    leak = judge.leaks[0].name
    table = Table(title=Text(f"{judge.name}: {leak}, higher where more was left"), title_justify="left")
    table.add_column("attack")
    for name in found:
        table.add_column(Text(name), justify="right")
    table.add_row("none", *(_shown(clean[name][leak].value) for name in found))
    for kind in chosen:
        cells = [outcomes[kind] for outcomes in found.values()]
        table.add_row(Text(kind), *(Text(_told(outcome, leak)) for outcome in cells))
    present({name: {"none": clean[name], **outcomes} for name, outcomes in found.items()}, table, as_json=as_json)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs on one model and benchmark, e.g. runs/*.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for the report of all together.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put the methods of several runs into one report; equal methods of several seeds become a mean."""
    from ..report import Report

    own = output and output.resolve()  # which runs/* holds, from the second time on
    found = {str(run): Report.load(run) for run in runs if (run / "report.json").is_file() and run.resolve() != own}
    if not found:
        raise InvalidConfig(f"none of {', '.join(map(str, runs))} holds a report.json: give folders of finished runs")
    _show(Report.merged(found), output, as_json=as_json)


@app.command()
def teach(
    data: Annotated[str, typer.Argument(help="A scope: what is to be forgotten later, and what is to be kept.")],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint, and for the work on it.")],
    model: Model = "smollm2",
    without_forget: Annotated[
        bool, typer.Option("--without-forget", help="The reference that never saw it, by the same recipe.")
    ] = False,
    set_: Settings = None,
) -> None:
    """Teach a model a scope, or all of it but what is to be forgotten, and write a checkpoint.

    The two are what unlearning starts from and what it is measured against. A call that was stopped goes on.
    """
    from ..activations.processes import Processes
    from ..component import build
    from ..config import override
    from ..data.scope import Scope
    from ..lm import LM
    from ..methods.teach import teach as learn
    from ..training import Optimisation

    settings: dict[str, object] = {}
    for line in set_ or []:
        override(settings, line)
    recipe = build(Optimisation, settings)
    with quiet(), bars() as track:
        lm, scope = LM.load(model), Scope.load(data)
        passages = (*scope.retain, *scope.near, *(() if without_forget else scope.forget))
        work = output.with_name(f"{output.name}.work")
        with track("teach", round(recipe.epochs * len(passages)) if recipe.max_steps is None else None) as progress:
            patch = learn(lm, passages, recipe=recipe, folder=work, progress=progress)
        if Processes.here().rank == 0:
            patch.bake(lm, output)
            shutil.rmtree(work)
    say(f"{output}: {lm.name}, taught {len(passages)} passages")


def _benchmark(scope: str | None, benchmark: str | None, max_probes: int | None) -> Benchmark:
    from ..component import build
    from ..data.scope import Scope
    from ..evaluation.benchmark import Benchmark
    from ..evaluation.benchmarks import ConceptBenchmark

    if scope is None and benchmark is None:
        raise InvalidConfig("give --scope, or --benchmark with data of its own")
    if benchmark is not None:
        if max_probes is not None:
            raise InvalidConfig("--max-probes goes with --scope: a benchmark says within --benchmark how much it asks")
        return Benchmark.parse(parsed(benchmark))
    assert scope is not None
    return build(ConceptBenchmark, {"scope": Scope.load(scope), "half": "test", "max_probes": max_probes})


def _request(judge: Benchmark, scope: str | None) -> Scope | None:
    """Where attacks take what was forgotten from: the benchmark, or a scope given beside one that does not hold it."""
    from ..data.scope import Scope

    return judge.request if scope is None or judge.request is not None else Scope.load(scope)


def _attacks(specs: Sequence[str]) -> dict[str, Attack]:
    from ..compare import named
    from ..evaluation.attacks import Attack

    return named([Attack.parse(parsed(spec)) for spec in specs])


def _unlearned(lm: LM, patches: Sequence[Path], checkpoints: Sequence[str], *, any_base: bool) -> dict[str, Unlearned]:
    from ..lm import LM
    from ..patches import load_patch

    found: dict[str, Unlearned] = {}
    for name, one in [(p.name, p) for p in patches] + [(Path(c).name, c) for c in checkpoints]:
        if name in found:
            raise InvalidConfig(f"two of these are called {name!r}: rename a folder")
        found[name] = load_patch(one, lm, any_base=any_base) if isinstance(one, Path) else LM.load(one)
    return found


def _show(report: Report, output: Path | None, *, as_json: bool) -> None:
    from ..activations.processes import Processes

    present(report.as_json(), report.table(), as_json=as_json)
    if output and Processes.here().rank == 0:
        report.save(output)
        say(f"\nreport: {output / 'report.html'}")


def _told(outcome: Outcome, leak: str) -> str:
    """The headline leak, or what else the attack measures, by its name."""
    if outcome.skipped is not None:
        return outcome.skipped
    if leak in outcome.results:
        return _shown(outcome.results[leak].value)
    return ", ".join(f"{name} {_shown(found.value)}" for name, found in outcome.results.items())


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
