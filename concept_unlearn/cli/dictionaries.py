"""Verbs that make dictionaries: from a model's own words to a trained and measured SAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import InvalidConfig
from .app import Model, Overrides, app, bars, console, quiet, say

if TYPE_CHECKING:
    from ..dictionaries import Quality


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
    from ..lm import LM
    from ..write import write as write_texts

    if not topics.is_file():
        raise InvalidConfig(f"no file of topics {topics}")
    asked = [line.strip() for line in topics.read_text().splitlines() if line.strip()]
    with quiet(), bars() as track:
        lm = LM.load(model)
        with track("write", per_topic * len(asked)) as progress:
            write_texts(
                lm, asked, output, per_topic=per_topic, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
                progress=progress,
            )  # fmt: skip
    say(f"{output}: {per_topic * len(asked)} texts")


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
    from ..config import load_config
    from ..recipe import Recipe, fill

    wanted = load_config(Recipe, recipe, set_ or [])
    folder = store or wanted.store
    if folder is None:
        raise InvalidConfig("the recipe has no store: give one with --store FOLDER or --set store=FOLDER")
    with quiet(), bars() as track:
        filled = fill(wanted, folder, tracker=track)
    say(f"{folder}: {filled.n_rows:,} rows of {', '.join(map(str, filled.sites))}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, see configs/dictionary.yaml and the schema verb.")],
    set_: Overrides = None,
) -> None:
    """Train dictionaries, SAEs or codebooks, as a recipe says: one for each site, all in one pass over the model.

    A training that was stopped goes on from its last checkpoint, to the same weights. Several processes share it:
    accelerate launch -m concept_unlearn train ...
    """
    from ..config import load_config
    from ..recipe import Recipe, make

    wanted = load_config(Recipe, recipe, set_ or [])
    with quiet(), bars() as track:
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
    from ..data.corpus import Corpus
    from ..dictionaries import evaluate_dictionary, load_dictionary
    from ..lm import LM
    from ..recipe import held_out_texts

    found = {}
    with quiet(), bars() as track:
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
