"""Verbs that show: which features belong to a concept, what they are about, and what a patch does to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import InvalidConfig
from .app import AsJson, Dictionary, Model, ScopeName, ScoreSpec, app, bars, parsed, present, quiet, say

if TYPE_CHECKING:
    from ..features import Inspection


@app.command()
def rank(
    scope: ScopeName,
    dictionary: Dictionary,
    model: Model = "smollm2",
    score: ScoreSpec = "selectivity",
    n: Annotated[int, typer.Option(help="How many to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the features that belong to a concept."""
    from ..data.scope import Scope
    from ..dictionaries import load_dictionary
    from ..features import Score, measure, select
    from ..lm import LM

    with quiet(), bars() as track:
        lm, loaded, chosen = LM.load(model), Scope.load(scope), Score.parse(parsed(score))
        features = load_dictionary(dictionary)
        n_passages = len(loaded.forget) + len(loaded.near) + len(loaded.retain)
        with track("measure features", n_passages) as progress:
            stats = measure(lm, features, loaded, progress=progress)
    values = chosen(stats)
    table = Table(title=Text(f"{loaded.name} in {features.name} by {chosen.kind}"), title_justify="left")
    rows = [
        {
            "feature": i, "score": values[i].item(), "forget_rate": stats.forget.rate[i].item(),
            "retain_rate": stats.retain.rate[i].item(), "forget_mean": stats.forget.mean[i].item(),
            "largest": stats.forget.largest[i].item(),
        }
        for i in select(stats, chosen, min(n, max(int(values.isfinite().sum()), 1)))
    ]  # fmt: skip
    for column in ("feature", "score", "forget tokens", "retain tokens", "forget mean", "largest"):
        table.add_column(column, justify="right")
    shapes = (
        "{feature}",
        "{score:.4g}",
        "{forget_rate:.2%}",
        "{retain_rate:.3%}",
        "{forget_mean:.3g}",
        "{largest:.3g}",
    )
    for row in rows:
        table.add_row(*(shape.format(**row) for shape in shapes))
    present(rows, table, as_json=as_json)


@app.command()
def inspect(
    scope: ScopeName,
    dictionary: Dictionary,
    output: Annotated[Path, typer.Option(help="Folder for inspection.html and inspection.json.")],
    model: Model = "smollm2",
    features: Annotated[str, typer.Option(help="Their numbers, with commas between; else the best by score.")] = "",
    choice: Annotated[
        Path | None, typer.Option(help="A choice.yaml that the page saved: begin with it, and show what it names.")
    ] = None,
    score: ScoreSpec = "selectivity",
    n: Annotated[int, typer.Option(help="How many features to show, where they are chosen by score.")] = 50,
    contexts: Annotated[int, typer.Option(help="Passages to show of each side.")] = 8,
    effects: Annotated[
        bool, typer.Option("--effects", help="Measure what suppressing each feature alone does to the scope's probes.")
    ] = False,
    edit: Annotated[
        str, typer.Option(help="How it is suppressed there, e.g. zero or '{kind: clamp, to: -50}'.")
    ] = "clamp",
    label_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible address up to /v1, which is sent passages and labels features."),
    ] = None,
    label_model: Annotated[str, typer.Option(help="The model to ask there.")] = "",
    label_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds its key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what features are about on a page on which to choose them by hand.

    The page works offline and saves the choice as YAML, which the unlearn verb takes as --choice.
    """
    from ..component import build
    from ..data.scope import Scope
    from ..dictionaries import load_dictionary
    from ..edits import Edit
    from ..evaluation.alone import effect_alone
    from ..features import Choice, Labeller, Score, inspect_features, measure, select
    from ..lm import LM

    made = Choice() if choice is None else Choice.load(choice)
    wanted = _numbers(features) or (*made.features, *made.drop)
    how = Edit.parse(parsed(edit))
    asked = {"url": label_url, "model": label_model, "key_env": label_key_env}
    if bool(label_url) != bool(label_model):
        raise InvalidConfig("labels need both --label-url and --label-model")
    labeller = build(Labeller, asked) if label_url else None
    with quiet(), bars() as track:
        lm, loaded, found = LM.load(model), Scope.load(scope), load_dictionary(dictionary)
        n_passages = len(loaded.forget) + len(loaded.near) + len(loaded.retain)
        if made.features:
            made.of(found)
        if not wanted:
            with track("measure features", n_passages) as progress:
                stats = measure(lm, found, loaded, progress=progress)
            chosen = Score.parse(parsed(score))
            wanted = select(stats, chosen, min(n, max(int(chosen(stats).isfinite().sum()), 1)))
        with track("inspect features", n_passages) as progress:
            seen = inspect_features(lm, found, loaded, wanted, contexts=contexts, progress=progress)
        if effects:
            with track("suppress each alone", len(wanted)) as progress:
                seen = seen.beside(effect_alone(lm, found, loaded, wanted, edit=how, progress=progress))
        seen.save(output, made)
        if labeller:
            with track("label features", len(wanted)) as progress:
                seen = labeller(seen, progress=progress)
            seen.save(output, made)
    present(seen, _table(seen), as_json=as_json)
    say(f"\npage: {output / 'inspection.html'}")


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What a user would type.")],
    patch: Annotated[Path, typer.Option(help="Folder of a saved patch.")],
    model: Model = "smollm2",
    strength: Annotated[float | None, typer.Option(help="The patch's own where not given.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The prompt as it is, past the chat template.")] = False,
    output: Annotated[Path | None, typer.Option(help="A .json file for all of it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show token by token what a patch does to one prompt: what fired, what the gate said, what comes next."""
    from ..files import write_atomically
    from ..lm import LM
    from ..patches import explain as explained
    from ..patches import load_patch

    with quiet():
        lm = LM.load(model)
        loaded = load_patch(patch, lm)
        found = explained(
            loaded if strength is None else loaded.at(strength), lm, prompt, chat=False if plain else None
        )
    present(found, found.table(), as_json=as_json)
    if output:
        write_atomically(output, found.model_dump_json(indent=1).encode())
        say(f"\n{output}")


def _numbers(text: str) -> Sequence[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidConfig(f"features are numbers with commas between, such as 12,3051; given: {text!r}") from None


def _table(seen: Inspection) -> Table:
    table = Table(title=Text(f"{seen.scope} in {seen.dictionary}"), title_justify="left")
    for column in ("feature", "forget tokens", "retain tokens"):
        table.add_column(column, justify="right")
    effects = any(shown.effect for shown in seen.features)
    for side in ("forget", "retain") if effects else ():
        table.add_column(f"alone, {side}", justify="right")
    table.add_column("about" if seen.labeller else "strongest on")
    for shown in seen.features:
        rates = [f"{side.rate.value:.2%}" for side in (shown.forget, shown.retain)]
        if effects:
            rates += (
                [f"{c.logprob:+.2f}" for c in (shown.effect.forget, shown.effect.retain)] if shown.effect else ["", ""]
            )
        about = shown.label or " ".join(repr(word)[1:-1] for word in shown.strongest[:6])
        about = about if shown.fires else "(never fires here)"
        table.add_row(str(shown.feature), *rates, Text(about))
    return table
