"""From a corpus to dictionaries: what to read, where, and what to train on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from .activations import Harvest, Live, RowSource, Store, harvest
from .activations.processes import Processes
from .component import Frozen
from .config import ModelSpec
from .data.corpus import Corpus, sequences
from .dictionaries import Dictionary, Quality, Training, evaluate_dictionary, train
from .errors import InvalidConfig
from .files import write_atomically
from .lm import LM, Site
from .tracking import Tracker, silent


class CorpusSpec(Frozen):
    source: str | tuple[str, ...]
    """Files (.txt, .jsonl, .parquet), folders of them, or a dataset of the Hub."""
    field: str = "text"
    """Of a row, the one that holds the text."""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def load(self) -> Corpus:
        source = [self.source] if isinstance(self.source, str) else list(self.source)
        return Corpus.load(source, field=self.field, split=self.split, subset=self.subset, revision=self.revision)


class Recipe(Frozen):
    """Everything that decides what a dictionary becomes. Unknown keys are errors."""

    model: ModelSpec = ModelSpec()
    corpus: CorpusSpec
    harvest: Harvest
    store: Path | None = None
    """Where rows are kept, to be trained on again; none streams them from the model to the trainer."""
    training: Training
    held_out: CorpusSpec | None = None
    """Text never trained on, to measure the dictionaries on."""
    held_out_tokens: int = 60_000
    output: Path = Path("runs/dictionaries")
    """A folder a site, each with its weights and a README."""


def fill(recipe: Recipe, folder: Path, *, tracker: Tracker | None = None) -> Store:
    """The store of a recipe: what is missing of it is harvested."""
    lm, corpus = recipe.model.load(), recipe.corpus.load()
    with (tracker or silent)("harvest", recipe.harvest.tokens) as progress:
        return harvest(lm, corpus, recipe.harvest, folder, progress=progress)


def make(
    recipe: Recipe,
    *,
    log: Callable[[int, Site, Mapping[str, float]], None] | None = None,
    tracker: Tracker | None = None,
) -> dict[Site, tuple[Dictionary, Quality | None]]:
    """Harvest what is missing, train what is not trained, measure on the held-out text, and write a card for each.

    Of several processes the first measures and answers, the others return nothing.
    """
    track = tracker or silent
    if recipe.training.evaluate_every and recipe.held_out is None:
        raise InvalidConfig("training.evaluate_every needs held_out: text to evaluate on")
    lm = recipe.model.load()
    source: RowSource
    if recipe.store is None:
        source = Live(lm, recipe.corpus.load(), recipe.harvest)
    else:
        with track("harvest", recipe.harvest.tokens) as progress:
            source = harvest(lm, recipe.corpus.load(), recipe.harvest, recipe.store, progress=progress)
    held_out = _held_out(lm, recipe)
    training = recipe.training

    def evaluate(dictionary: Dictionary) -> dict[str, float]:
        return evaluate_dictionary(lm, dictionary, held_out).model_dump()

    with track("train", training.n_steps * training.batch) as progress:
        trained = train(
            source, training, recipe.output, device=lm.device, log=log, progress=progress,
            evaluate=evaluate if held_out and training.evaluate_every else None,
        )  # fmt: skip
    made: dict[Site, tuple[Dictionary, Quality | None]] = {}
    for site, dictionary in trained.items():
        quality = None
        if Processes.here().rank:
            continue
        if held_out:
            with track(f"measure {site}", 3 * len(held_out)) as progress:
                quality = evaluate_dictionary(lm, dictionary, held_out, progress=progress)
        write_atomically(recipe.output / str(site) / "README.md", _card(recipe, lm, dictionary, quality).encode())
        made[site] = (dictionary, quality)
    return made


def held_out_texts(lm: LM, corpus: Corpus, *, context: int, tokens: int) -> list[list[int]]:
    """Sequences of the corpus, up to about so many tokens."""
    return list(islice(sequences(corpus, lm.tokenizer, context=context), max(1, tokens // context)))


def _held_out(lm: LM, recipe: Recipe) -> list[list[int]]:
    if recipe.held_out is None:
        return []
    return held_out_texts(lm, recipe.held_out.load(), context=recipe.harvest.context, tokens=recipe.held_out_tokens)


def _card(recipe: Recipe, lm: LM, dictionary: Dictionary, quality: Quality | None) -> str:
    training, harvested = recipe.training, recipe.harvest.tokens
    spec = ", ".join(f"{key} {value}" for key, value in training.architecture.spec().items() if value is not None)
    rows = {
        "model": f"{lm.name} (fingerprint {lm.fingerprint})",
        "site": str(dictionary.site),
        "architecture": spec,
        "features": f"{dictionary.n_features:,}",
        "trained on": f"{training.n_steps * training.batch:,} tokens"
        + (f", drawn from at most {harvested:,} of {recipe.corpus.load().name}" if harvested else ""),
        "left out": f"BOS, what every chat begins with, sinks (norm above {dictionary.max_norm:.0f})",
    }
    if quality is not None:
        rows |= {
            "variance explained": f"{quality.variance_explained:.3f}",
            "L0": f"{quality.l0:.1f}",
            "features that never fire": f"{quality.dead:.1%}",
            "loss recovered when spliced in": f"{quality.loss_recovered:.4f} ({quality.loss:.3f} nats a token, "
            f"{quality.loss_spliced:.3f} spliced, {quality.loss_zeroed:.3f} zeroed)",
        }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    where = "" if quality is None else (
        f"\nThe last four were measured on {quality.n_tokens:,} tokens of text that was not trained on.\n"
    )  # fmt: skip
    return f"# {dictionary.site} of {lm.name}\n\n| | |\n|---|---|\n{table}{where}"
