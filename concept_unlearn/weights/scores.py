"""How much a weight has to do with what is to be forgotten: published rules over the same evidence."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..component import Component
from ..errors import InvalidConfig
from .masks import median

Source = Literal["forget", "retain", "inputs"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the weights, by the names of parameters: of the sources, those that were asked for."""

    weights: Tensors
    """theta, in float32 or float64."""
    forget: Tensors = field(default_factory=dict)
    """g_f, the gradient of the mean loss of a token of what is to be forgotten."""
    retain: Tensors = field(default_factory=dict)
    """g_r, of what is to be kept."""
    inputs: Tensors = field(default_factory=dict)
    """The root mean square of what each weight is multiplied with, over the tokens to be forgotten."""

    @cached_property
    def balance(self) -> float:
        """median|g_r| / median|theta|. Zeros are left out: words that no text has would decide it otherwise."""
        if not (retained := median(self.retain)) or not (weight := median(self.weights)):
            raise InvalidConfig("gamma_h: the retained text has no gradient here to weigh against, so give a number")
        return retained / weight


class WeightScore(Component, family=True):
    """(evidence, name of a parameter) -> one number a weight, not below 0; larger goes first"""

    reads: ClassVar[tuple[Source, ...]] = ()
    """What it asks of the evidence, besides the weights."""

    @abstractmethod
    def __call__(self, known: Evidence, name: str) -> Float[Tensor, "*shape"]: ...


class WagleWeightScore(WeightScore):
    """|(theta - g_r / gamma_h) g_f|: what forgetting would change, less what is kept (WAGLE, arXiv 2410.17509).

    Gradients are those of means, not sums over batches, so gamma_h does not depend on how many batches there are.
    """

    reads = ("forget", "retain")

    gamma_h: float | None = Field(None, gt=0)
    """A scalar for the Hessian's diagonal. None makes both terms weigh alike, median|g_r| / median|theta|; the authors'
    code has 1e-6, at which the ranking is that of |g_r g_f|.
    """

    def __call__(self, known: Evidence, name: str) -> Tensor:
        theta, gamma = known.weights[name], known.balance if self.gamma_h is None else self.gamma_h
        return ((theta - known.retain[name].to(theta) / gamma) * known.forget[name].to(theta)).abs()


class SnipWeightScore(WeightScore):
    """|theta g_f| (SNIP, arXiv 1810.02340): WAGLE for gamma_h without bound."""

    reads = ("forget",)

    def __call__(self, known: Evidence, name: str) -> Tensor:
        theta = known.weights[name]
        return (theta * known.forget[name].to(theta)).abs()


class GradientWeightScore(WeightScore):
    """|g_f|"""

    reads = ("forget",)

    def __call__(self, known: Evidence, name: str) -> Tensor:
        return known.forget[name].to(known.weights[name]).abs()


class MagnitudeWeightScore(WeightScore):
    """|theta|"""

    def __call__(self, known: Evidence, name: str) -> Tensor:
        return known.weights[name].abs()


class WandaWeightScore(WeightScore):
    """|theta| times the norm of its input over the text to be forgotten (Wanda, arXiv 2306.11695).

    It is of linear layers' weights only: name them as ``parameters``, e.g. "*_proj.weight".
    """

    reads = ("inputs",)

    def __call__(self, known: Evidence, name: str) -> Tensor:
        theta = known.weights[name]
        return theta.abs() * known.inputs[name].to(theta)


class RandomWeightScore(WeightScore):
    """Any weights: what a score has to be better than."""

    seed: int = 0

    def __call__(self, known: Evidence, name: str) -> Tensor:
        theta = known.weights[name]
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {name}").getrandbits(63))
        return torch.rand(theta.shape, generator=generator, dtype=theta.dtype).to(theta)
