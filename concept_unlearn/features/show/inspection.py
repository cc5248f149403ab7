"""What features are about, as plain data: saved, loaded, and shown as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ...component import Frozen
from ...errors import CorruptArtifact, InvalidConfig, InvalidData
from ...files import write_atomically
from .choice import Choice
from .effect import Effect
from .rate import Rate

Part = Literal["forget", "near", "retain"]


class Context(Frozen):
    """A stretch of a passage around its strongest token."""

    part: Part
    passage: int
    """Which of the scope's passages of this part."""
    position: int
    """Of the strongest token, among those of the passage without BOS."""
    peak: int
    """Of the same token, among ``tokens``."""
    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    """Of each token."""


class Side(Frozen):
    """What a feature does on what is to be forgotten, or on what is to be kept."""

    rate: Rate
    contexts: tuple[Context, ...]
    """One a passage, the strongest first."""
    density: tuple[int, ...]
    """Tokens on which it fires, by the bins of ``Shown.edges``."""


class Token(Frozen):
    text: str
    logit: float


class Neighbour(Frozen):
    feature: int
    cosine: float


class Shown(Frozen):
    """One feature."""

    feature: int
    forget: Side
    retain: Side
    """Near passages among them."""
    edges: tuple[float, ...]
    """Of activations, one more than there are bins; none where it never fires."""
    norm: float
    """Of its decoder row: how much a unit of it writes."""
    up: tuple[Token, ...]
    """What its decoder row raises most, read by the unembedding alone."""
    down: tuple[Token, ...]
    nearest: tuple[Neighbour, ...]
    """By cosine of decoder rows."""
    effect: Effect | None = None
    """What suppressing it alone does, where that was measured."""
    label: str | None = None
    """What a model says it is about, where one was asked."""

    @property
    def fires(self) -> bool:
        return self.forget.rate.fired + self.retain.rate.fired > 0

    @property
    def strongest(self) -> tuple[str, ...]:
        """The tokens on which it fires most, where it can on what is to be forgotten."""
        contexts = self.forget.contexts or self.retain.contexts
        return tuple(dict.fromkeys(context.tokens[context.peak].strip() for context in contexts))


class Inspection(Frozen):
    """What chosen features of one dictionary are about, on one scope."""

    model: str
    dictionary: str
    site: str
    scope: str
    has_lens: bool
    """False where the dictionary writes to another space than the unembedding reads."""
    features: tuple[Shown, ...]
    labeller: str | None = None
    """The model that wrote the labels."""
    neuronpedia_id: str | None = None
    """``model/source`` of the dictionary there, where it has one: ``gemma-2-2b/20-gemmascope-res-16k``."""

    def of(self, feature: int) -> Shown:
        """Raises InvalidConfig for one that was not looked at."""
        for shown in self.features:
            if shown.feature == feature:
                return shown
        known = ", ".join(str(shown.feature) for shown in self.features[:20])
        raise InvalidConfig(f"feature {feature} of {self.dictionary} was not looked at; the first that were: {known}")

    def beside(self, effects: Mapping[int, Effect]) -> Inspection:
        """With what suppressing each feature alone does, as ``effect_alone`` gives it."""
        shown = (s.model_copy(update={"effect": effects.get(s.feature, s.effect)}) for s in self.features)
        return self.model_copy(update={"features": tuple(shown)})

    def labelled(self, labels: Mapping[int, str], by: str) -> Inspection:
        """With what ``by`` says that each feature is about."""
        shown = (s.model_copy(update={"label": labels.get(s.feature, s.label)}) for s in self.features)
        return self.model_copy(update={"features": tuple(shown), "labeller": by})

    @property
    def neuronpedia(self) -> str | None:
        """The dictionary's address there; a feature's is ``{this}/{feature}``. None where it has no page."""
        has_page = re.fullmatch(r"[\w.-]+/[\w.-]+", self.neuronpedia_id or "")
        return f"https://www.neuronpedia.org/{self.neuronpedia_id}" if has_page else None

    def neuronpedia_list(self) -> list[dict[str, str]]:
        """The features by Neuronpedia's names, in the shape of its lists; none where the dictionary has no page."""
        if self.neuronpedia is None or self.neuronpedia_id is None:
            return []
        model, source = self.neuronpedia_id.split("/")
        rows = ({"modelId": model, "layer": source, "index": str(s.feature)} for s in self.features)
        return [r | ({"description": s.label} if s.label else {}) for r, s in zip(rows, self.features, strict=True)]

    def html(self, choice: Choice | None = None) -> str:
        """One page that needs nothing else, on which features are chosen; it begins with ``choice``."""
        from .page import render

        return render(self, choice or Choice())

    def _repr_html_(self) -> str:
        style = "width:100%;height:44rem;border:1px solid #8886;border-radius:.5rem"
        return f'<iframe title="features" srcdoc="{escape(self.html())}" style="{style}"></iframe>'

    def save(self, folder: str | Path, choice: Choice | None = None) -> Path:
        """``inspection.json``, which ``load`` reads, ``inspection.html``, and ``neuronpedia.json`` if it has pages."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "inspection.html", self.html(choice).encode())
        write_atomically(folder / "inspection.json", self.model_dump_json().encode())
        if rows := self.neuronpedia_list():
            write_atomically(folder / "neuronpedia.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Inspection:
        """Raises InvalidData where there is none, CorruptArtifact for a broken one."""
        path = Path(folder) / "inspection.json"
        if not path.is_file():
            raise InvalidData(f"{folder} holds no inspection: there is no {path.name} in it")
        try:
            return cls.model_validate_json(path.read_bytes())
        except (ValidationError, InvalidConfig) as error:
            raise CorruptArtifact(f"{path} is no inspection of this version: {str(error).splitlines()[0]}") from None
