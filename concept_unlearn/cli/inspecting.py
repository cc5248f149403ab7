"""Verbs that show: what features are about, and what a patch does to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import InvalidConfig
from .app import Dictionary, Model, ScopeName, Spec, app, bars, console, parsed, quiet, say

if TYPE_CHECKING:
    from ..features import Inspection


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
    score: Spec = "selectivity",
    n: Annotated[int, typer.Option(help="How many features to show, where they are chosen by score.")] = 50,
    contexts: Annotated[int, typer.Option(help="Passages to show of each side.")] = 8,
) -> None:
    """Show what features are about on a page on which to choose them by hand.

    The page works offline and saves the choice as YAML, which the unlearn verb takes as --choice.
    """
    from ..data.scope import Scope
    from ..dictionaries import load_dictionary
    from ..features import Choice, Score, inspect_features, measure, select
    from ..lm import LM

    made = Choice() if choice is None else Choice.load(choice)
    wanted = _numbers(features) or (*made.features, *made.drop)
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
    seen.save(output, made)
    console.print(_table(seen))
    say(f"\npage: {output / 'inspection.html'}")


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What a user would type.")],
    patch: Annotated[Path, typer.Option(help="Folder of a saved patch.")],
    model: Model = "smollm2",
    strength: Annotated[float | None, typer.Option(help="The patch's own where not given.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The prompt as it is, past the chat template.")] = False,
    output: Annotated[Path | None, typer.Option(help="A .json file for all of it.")] = None,
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
    console.print(found.table())
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
    table.add_column("raises" if seen.has_lens else "strongest on")
    for shown in seen.features:
        peaks = [c.tokens[c.peak] for c in shown.forget.contexts] or [c.tokens[c.peak] for c in shown.retain.contexts]
        words = [token.text for token in shown.up] if seen.has_lens else list(dict.fromkeys(peaks))
        rates = [f"{side.rate.value:.2%}" for side in (shown.forget, shown.retain)]
        about = " ".join(repr(word.strip())[1:-1] for word in words[:6]) if shown.fires else "(never fires here)"
        table.add_row(str(shown.feature), *rates, Text(about))
    return table
