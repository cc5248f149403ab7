"""An inspection as one page that needs nothing else: features beside what they are about, and buttons to choose."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import to_json

from .choice import Choice
from .inspection import Inspection


def render(inspection: Inspection, choice: Choice) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    data = {
        "dictionary": inspection.dictionary,
        "scope": inspection.scope,
        "has_lens": inspection.has_lens,
        "labeller": inspection.labeller,
        "neuronpedia": inspection.neuronpedia,
        "features": [shown.model_dump(mode="json") for shown in inspection.features],
        "choice": {name: getattr(choice, name) for name in ("keep", "drop", "pinned")},
    }
    return environment.get_template("page.html.j2").render(inspection=inspection, data=_embedded(data))


def _embedded(data: object) -> Markup:
    """JSON within a script element, which nothing in it can end."""
    return Markup(to_json(data, inf_nan_mode="strings").decode().replace("<", "\\u003c"))
