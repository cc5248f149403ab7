"""Features chosen by hand: a small YAML file, as the page of an inspection writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import yaml
from pydantic import field_validator, model_validator

from ...component import Frozen, build
from ...dictionaries import Dictionary
from ...dictionaries.base import check_features
from ...errors import DictionaryMismatch, InvalidConfig
from ...files import write_atomically


class Choice(Frozen):
    """What somebody decided about features; ``FeaturePatch(dictionary=sae, features=choice.of(sae))`` edits them."""

    keep: tuple[int, ...] = ()
    """They belong to the concept: edit them."""
    drop: tuple[int, ...] = ()
    """They do not: never edit them, whatever a score says."""
    pinned: tuple[int, ...] = ()
    """Edit them before all others."""
    dictionary: str | None = None
    """Whose features they are, by name."""

    @field_validator("keep", "drop", "pinned", mode="before")
    @classmethod
    def _may_be_empty(cls, given: object) -> object:
        return () if given is None else given  # as YAML has "keep:" with nothing behind it

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        everything = (*self.keep, *self.drop, *self.pinned)
        if twice := sorted({i for i in everything if everything.count(i) > 1}):
            raise ValueError(f"feature {twice[0]} is decided about more than once")
        return self

    @property
    def features(self) -> tuple[int, ...]:
        """To be edited: the pinned ones, then the others."""
        return self.pinned + self.keep

    def of(self, dictionary: Dictionary) -> tuple[int, ...]:
        """``features`` of this dictionary. Raises DictionaryMismatch where they are another's, InvalidConfig where
        there are none or it has no such feature.
        """
        if self.dictionary not in (None, dictionary.name):
            raise DictionaryMismatch(f"these features were chosen in {self.dictionary}, not in {dictionary.name}")
        return check_features(self.features, dictionary.n_features, dictionary.name)

    def over(self, ranked: Sequence[int], n: int) -> tuple[int, ...]:
        """``n`` features and all pinned ones: those chosen, then the first of a ranking that were not dropped."""
        chosen = (*self.features, *(i for i in ranked if i not in {*self.features, *self.drop}))
        return chosen[: max(n, len(self.pinned))]

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.yaml().encode())
        return path

    def yaml(self) -> str:
        known = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(known, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)

    @classmethod
    def load(cls, path: str | Path) -> Choice:
        """Raises InvalidConfig."""
        path = Path(path)
        if not path.is_file():
            raise InvalidConfig(f"no file of chosen features {path}")
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(found, dict):
            raise InvalidConfig(f"{path} should hold keep, drop and pinned; it holds {type(found).__name__}")
        return build(cls, found)
