"""A change of one parameter: all of it, two thin factors, or the entries under a mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InvalidConfig, PatchMismatch, UnknownName
from .bits import packed, unpacked

STORED = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """What is added to a parameter. Its tensors are detached, of a dtype in ``STORED``, and never written to."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Delta]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Delta.kinds[cls.kind] = cls

    def __post_init__(self) -> None:
        for name, given in self._fields().items():
            if given.dtype not in STORED and name != "mask":
                raise _not_stored(given.dtype)
            object.__setattr__(self, name, given.detach())

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The change itself, in float32 (float64 if it is held so). Not to be written to."""

    @abstractmethod
    def scaled(self, factor: float) -> Self: ...

    @property
    def n_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(t.numel() for t in self._fields().values() if t.is_floating_point())

    def to(self, dtype: torch.dtype | None = None, *, device: torch.device | str | None = None) -> Self:
        """Held in another dtype (raises InvalidConfig for one not in ``STORED``) or on another device."""
        if dtype is not None and dtype not in STORED:
            raise _not_stored(dtype)
        held = self._fields().items()
        moved = {name: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for name, t in held}
        return replace(self, **moved)

    def spec(self) -> dict[str, Any]:
        """What ``tensors`` leaves out; ``restore_delta`` makes an equal change of the two."""
        return {"kind": self.kind}

    def tensors(self) -> dict[str, Tensor]:
        return self._fields()

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(**tensors)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape can be changed by it."""
        return self.shape == shape

    def added_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """weight + strength * change, a new tensor like ``weight``; entries that do not change keep every bit.

        Computed in float32 (float64 if the weight is) and rounded once. Raises PatchMismatch for another shape.
        """
        if not self.fits(tuple(weight.shape)):
            raise PatchMismatch(f"a change of shape {self.shape} does not fit a weight of shape {tuple(weight.shape)}")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = strength * self.to(device=weight.device).dense().to(wide).reshape(weight.shape)
        return torch.where(change == 0, weight, (weight.to(wide) + change).to(weight.dtype))

    def _fields(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """Every entry."""

    change: Float[Tensor, "*shape"]
    kind = "dense"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change.shape)

    def dense(self) -> Tensor:
        return _wide(self.change)

    def scaled(self, factor: float) -> Dense:
        return Dense(_times(self.change, factor))


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """up @ down; whatever scales the product (LoRA's alpha / r) is in ``up`` already.

    The product has the parameter's own layout: of a Conv1D, which holds [in, out], it is the transpose of LoRA's B A.
    A parameter that is no matrix is changed by the product reshaped.
    """

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]
    kind = "low_rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            given = f"{tuple(self.up.shape)} and {tuple(self.down.shape)}"
            raise InvalidConfig(f"the factors of a low-rank change have shapes [out, r] and [r, in]; given: {given}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape or (len(shape) != 2 and math.prod(self.shape) == math.prod(shape))

    def dense(self) -> Tensor:
        up, down = _wide(self.up), _wide(self.down)
        both = torch.promote_types(up.dtype, down.dtype)
        return up.to(both) @ down.to(both)

    def scaled(self, factor: float) -> LowRank:
        return LowRank(_times(self.up, factor), self.down)


@dataclass(frozen=True, eq=False)
class Sparse(Delta):
    """The entries under ``mask``, in flat order. On disk the mask takes one bit an entry."""

    values: Float[Tensor, " n"]
    mask: Bool[Tensor, "*shape"]
    kind = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = int(self.mask.count_nonzero())
        if self.mask.dtype != torch.bool or self.values.shape != (n,):
            raise InvalidConfig(
                f"a sparse change has a boolean mask and one value for each entry under it; given: a mask of "
                f"{self.mask.dtype} over {n} entries and values of shape {tuple(self.values.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    def dense(self) -> Tensor:
        values = _wide(self.values)
        return values.new_zeros(self.shape).masked_scatter(self.mask, values)

    def scaled(self, factor: float) -> Sparse:
        return Sparse(_times(self.values, factor), self.mask)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"shape": list(self.shape)}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "mask": packed(self.mask)}

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sparse:
        return cls(tensors["values"], unpacked(tensors["mask"], spec["shape"]))


def restore_delta(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
    """Raises UnknownName for a kind of another version."""
    if spec["kind"] not in Delta.kinds:
        raise UnknownName("kind of delta", spec["kind"], Delta.kinds)
    return Delta.kinds[spec["kind"]].restore(spec, tensors)


def _not_stored(dtype: torch.dtype) -> InvalidConfig:
    return InvalidConfig(f"a change is held in {', '.join(map(str, STORED))}; given: {dtype}")


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _times(values: Tensor, factor: float) -> Tensor:
    return (factor * _wide(values)).to(values.dtype)
