"""What features are about, as plain data: saved, loaded, and shown as a page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ...component import Frozen
from ...errors import CorruptArtifact, InvalidConfig, InvalidData
from ...files import write_atomically
from .choice import Choice
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

    @property
    def fires(self) -> bool:
        return self.forget.rate.fired + self.retain.rate.fired > 0


class Inspection(Frozen):
    """What chosen features of one dictionary are about, on one scope."""

    model: str
    dictionary: str
    site: str
    scope: str
    has_lens: bool
    """False where the dictionary writes to another space than the unembedding reads."""
    features: tuple[Shown, ...]

    def of(self, feature: int) -> Shown:
        """Raises InvalidConfig for one that was not looked at."""
        for shown in self.features:
            if shown.feature == feature:
                return shown
        known = ", ".join(str(shown.feature) for shown in self.features[:20])
        raise InvalidConfig(f"feature {feature} of {self.dictionary} was not looked at; the first that were: {known}")

    def html(self, choice: Choice | None = None) -> str:
        """One page that needs nothing else, on which features are chosen; it begins with ``choice``."""
        from .page import render

        return render(self, choice or Choice())

    def _repr_html_(self) -> str:
        style = "width:100%;height:44rem;border:1px solid #8886;border-radius:.5rem"
        return f'<iframe title="features" srcdoc="{escape(self.html())}" style="{style}"></iframe>'

    def save(self, folder: str | Path, choice: Choice | None = None) -> Path:
        """``inspection.json``, which ``load`` reads, and ``inspection.html``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "inspection.html", self.html(choice).encode())
        write_atomically(folder / "inspection.json", self.model_dump_json().encode())
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
