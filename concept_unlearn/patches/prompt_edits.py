"""What is done to the embeddings of a prompt: learned vectors are added, or they are corrupted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import DictionaryMismatch, InvalidConfig, PatchNotReached
from .noise import gaussian


class Prompt(NamedTuple):
    """The tokens of a pass as an edit sees them."""

    where: Bool[Tensor, "batch seq"]
    """True where the position is the prompt's own text: no padding, no BOS, nothing of what every chat begins with."""
    position: Int[Tensor, "batch seq"]
    """Which token of that text it is, from 0."""
    score: Float[Tensor, "batch seq"] | None
    """The strongest activation of the patch's sensor."""
    keys: Int[Tensor, "batch seq"] | None
    """Of each token and all before it, see ``prefix_keys``; None where the pass came as embeddings."""


class PromptEdit(ABC):
    """embeddings -> what is added to them"""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[PromptEdit]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        PromptEdit.kinds[cls.kind] = cls

    @abstractmethod
    def __call__(self, x: Float[Tensor, "batch seq d"], prompt: Prompt) -> Float[Tensor, "batch seq d"]:
        """Zero where nothing is changed."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What ``tensors`` leaves out, as plain data."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    @abstractmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Self: ...


@dataclass(frozen=True)
class Vectors(PromptEdit):
    """The i-th of k vectors is added to the i-th token of the prompt's text, or one vector to all of them."""

    vectors: Float[Tensor, "k d"]
    where: Literal["first", "all"] = "first"
    kind = "vectors"

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not len(self.vectors) or self.where not in ("first", "all"):
            raise InvalidConfig(
                f"vectors are [k, d], where is first or all; given: {list(self.vectors.shape)}, {self.where!r}"
            )
        if self.where == "all" and len(self.vectors) > 1:
            raise InvalidConfig(f"one vector is added to all tokens; given: {len(self.vectors)}")

    def __call__(self, x: Tensor, prompt: Prompt) -> Tensor:
        vectors = self.vectors.to(x.device).float()
        if vectors.shape[1] != x.shape[-1]:
            raise DictionaryMismatch(f"vectors of {vectors.shape[1]} dimensions met embeddings of {x.shape[-1]}")
        if self.where == "all":
            return torch.where(prompt.where[..., None], vectors[0], 0.0)
        within = prompt.where & (prompt.position < len(vectors))
        return torch.where(within[..., None], vectors[prompt.position.clamp(0, len(vectors) - 1)], 0.0)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "where": self.where}

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Vectors:
        return cls(tensors["vectors"], spec["where"])


@dataclass(frozen=True)
class Corruption(PromptEdit):
    """The first n dimensions of some tokens, corrupted (embedding-corrupted prompts, arXiv 2406.07933).

    Noise is a function of the seed and of the tokens up to and with its own: a prompt gets the same at any time.
    """

    sigma: float = 1.0
    """Standard deviation of the noise, in the embeddings' own unit."""
    how: Literal["noise", "zero", "flip"] = "noise"
    n: int | None = None
    """None: all of them."""
    above: float | None = None
    """Tokens on which the sensor exceeds it are corrupted. Where there is none, or for None, all but the last are; the
    last one too where it is alone."""
    seed: int = 0
    kind = "corruption"

    def __post_init__(self) -> None:
        if self.how not in ("noise", "zero", "flip"):
            raise InvalidConfig(f"embeddings are corrupted by noise, zero or flip; given: {self.how!r}")
        if not 0 <= self.sigma < float("inf"):
            raise InvalidConfig(f"sigma is a standard deviation, 0 or more; given: {self.sigma}")
        if self.n is not None and self.n < 1:
            raise InvalidConfig(f"n counts dimensions, from 1; given: {self.n}")

    def __call__(self, x: Tensor, prompt: Prompt) -> Tensor:
        d = x.shape[-1]
        n = d if self.n is None else self.n
        if n > d:
            raise InvalidConfig(f"the first {n} dimensions of embeddings of {d}: set n to at most {d}")
        wide = x[..., :n].float()
        match self.how:
            case "noise":
                if prompt.keys is None:
                    raise PatchNotReached("noise is drawn by token ids, and this prompt came as embeddings")
                change = self.sigma * gaussian(prompt.keys, n, seed=self.seed)
            case "zero":
                change = -wide
            case "flip":
                change = -2 * wide
        change = torch.where(self._picked(prompt)[..., None], change, 0.0)
        return torch.nn.functional.pad(change, (0, d - n))

    def _picked(self, prompt: Prompt) -> Bool[Tensor, "batch seq"]:
        """A prompt that comes in pieces is judged piece by piece."""
        where = prompt.where
        after = where.flip(1).long().cumsum(1).flip(1)
        rest = where & ((after > 1) | (where.sum(1, keepdim=True) == 1))
        if self.above is None or prompt.score is None:
            return rest
        flagged = where & (prompt.score > self.above)
        return torch.where(flagged.any(1, keepdim=True), flagged, rest)

    def spec(self) -> dict[str, Any]:
        own = ("sigma", "how", "n", "above", "seed")
        return {"kind": self.kind} | {name: getattr(self, name) for name in own}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Corruption:
        return cls(**{name: value for name, value in spec.items() if name != "kind"})
