"""What all verbs share: the application, its console, options, progress bars and the way errors are told."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic_core import to_json
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..errors import ConceptUnlearnError, InvalidConfig

app = typer.Typer(
    help="Make a language model forget a concept, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()

Model = Annotated[str, typer.Option(help="smollm2, a Hub id, a folder or a .gguf file.")]
ScopeName = Annotated[str, typer.Option("--scope", help="A built-in concept, a folder, a .jsonl file or a dataset id.")]
Dictionary = Annotated[
    str, typer.Option(help="A shipped dictionary, a SAELens folder, release/sae_id, or a Hub repository.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, e.g. method.n=20 or training.lr=1e-4. Repeatable.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting, e.g. lr=1e-4 or max_steps=20. Repeatable.")
]
ScoreSpec = Annotated[
    str, typer.Option(help="By name or as YAML, e.g. 'fisher' or '{kind: selectivity, min_ratio: 2}'.")
]


def _hush(as_json: bool) -> bool:
    console.quiet = console.quiet or as_json
    return as_json


AsJson = Annotated[
    bool, typer.Option("--json", callback=_hush, help="The result as JSON on standard output, and nothing else there.")
]


@app.callback()
def begin(
    load: Annotated[
        list[str] | None,
        typer.Option(help="A module or .py file of yours, whose components are then known by name. Repeatable."),
    ] = None,
    silent: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but errors and data: no bars, no tables.")
    ] = False,
) -> None:
    console.quiet = silent or not _speaks()
    for name in load or ():
        load_module(name)


def load_module(name: str) -> None:
    """Run a module once, by its dotted name or its file, so that it registers its components. Raises InvalidConfig."""
    path = Path(name).expanduser()
    if path.suffix != ".py":
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InvalidConfig(f"--load {name}: {error}; give a .py file, or a module that Python finds") from None
        return
    if not path.is_file():
        raise InvalidConfig(f"--load {name}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


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


def say(line: str) -> None:
    """A line as it is: what it names, such as a path, stays whole in a narrow terminal."""
    console.print(line, soft_wrap=True, markup=False)


def present(result: Any, table: RenderableType, *, as_json: bool) -> None:
    """A verb's result: a table for people, or plain data for scripts."""
    if not as_json:
        console.print(table)
    else:
        write_json(result)


def write_json(data: Any) -> None:
    if _speaks():
        sys.stdout.write(to_json(data, indent=1, inf_nan_mode="strings").decode() + "\n")


def _speaks() -> bool:
    """Of several processes the first does the talking."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bars() -> Iterator[Callable[[str, int | None], Any]]:
    """One bar a stage; they go when all is done, so that the table stands alone. A log gets a line each, on stderr."""
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
            if not console.is_terminal and not console.quiet:
                sys.stderr.write(f"{title}\n")
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)
            seen = progress.tasks[task].completed
            progress.update(task, total=total or seen or 1, completed=total or seen or 1)

        yield track


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries' own progress bars and advice, out of the way of ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for talkative in ("torchao", "torch.utils._pytree"):  # of kernels for other machines
        logging.getLogger(talkative).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def parsed(text: str) -> Any:
    """What an option says in YAML. Raises InvalidConfig."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{text!r} is not YAML: {str(error).splitlines()[0]}") from None
