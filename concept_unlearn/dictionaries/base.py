"""A dictionary writes an activation as a sum of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import DictionaryMismatch, InvalidConfig
from ..lm import Site
from .slice import Slice


@runtime_checkable
class Dictionary(Protocol):
    """What reads an activation at a site as a sum of features: SAELens' SAEs, and anything of this shape."""

    @property
    def name(self) -> str: ...

    @property
    def site(self) -> Site:
        """Where it reads."""

    @property
    def site_out(self) -> Site:
        """Where what it decodes belongs: the same place, except for transcoders."""

    @property
    def n_features(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def max_norm(self) -> float:
        """Tokens with a larger norm were left out of its training; infinite where nothing is known."""

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n_features"]: ...

    def decode(self, acts: Float[Tensor, "*batch n_features"], x: Float[Tensor, "*batch d"]) -> Tensor:
        """``x`` is what was encoded: some dictionaries scale their output by its norm."""

    def slice(self, features: Sequence[int]) -> Slice:
        """What an edit of these features needs. Raises NotExact where no slice is exact."""

    def to(self, device: torch.device) -> Dictionary: ...


def check_width(reader: Dictionary | Slice, x: Float[Tensor, "*batch d"]) -> None:
    """Raises DictionaryMismatch for an activation of another width than is read."""
    if x.shape[-1] != reader.d_in:
        what = getattr(reader, "name", "a feature's encoder")
        raise DictionaryMismatch(
            f"{what} reads {reader.d_in} numbers a token; {reader.site} of this model has {x.shape[-1]}"
        )


def check_features(features: Sequence[int], n_features: int, name: str) -> tuple[int, ...]:
    """Raises InvalidConfig for none, repeated or out-of-range indices."""
    chosen = tuple(int(i) for i in features)
    if not chosen:
        raise InvalidConfig(f"no feature of {name} was chosen: a patch needs at least one")
    if bad := [i for i in chosen if not 0 <= i < n_features]:
        raise InvalidConfig(f"{name} has features 0 to {n_features - 1}; given: {bad[0]}")
    if len(set(chosen)) != len(chosen):
        raise InvalidConfig(f"features of {name} are given more than once: {sorted(chosen)}")
    return chosen
