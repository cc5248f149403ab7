"""Weights rounded to a few bits: what training has hidden below the rounding comes back (arXiv 2410.16454)."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import InvalidConfig, MissingExtra
from ...lm import LM
from ...lm.locate import root
from ...patches import Patch
from ...patches.base import Switch, check_strength
from ...patches.layers import changing
from ...patches.origin import Origin
from .base import Access, Victim, Way, _Ways, upon

Bits = Literal[4, 8]


class Quantise(_Ways):
    """The patched model with its linear layers rounded to nearest, as torchao does it, and computed as before."""

    access: ClassVar[Access] = "weights"

    bits: Bits = 4
    group: int | None = Field(128, gt=0)
    """Weights of a row that share a scale: so many, or as many as both divide where they do not divide the row; None
    takes the row whole."""

    def ways(self, victim: Victim) -> Iterable[Way]:
        yield Way(self.tampered(victim))

    def tampered(self, victim: Victim) -> Patch:
        if importlib.util.find_spec("torchao") is None:
            raise MissingExtra("torchao", "to quantise weights")
        return upon(victim.patch, RoundedPatch(self.bits, self.group))


@dataclass(frozen=True)
class RoundedPatch(Patch):
    """w' = s round(w / s), s = max(-min w / 2^(bits-1), max w / (2^(bits-1) - 1)) over the group.

    Of every linear layer's weight as the patch finds it; embeddings, the head and norms are left alone.
    """

    bits: Bits
    group: int | None = None
    strength: float = 1.0
    origin: Origin | None = None
    kind = "rounded"
    access = "weights"

    def __post_init__(self) -> None:
        check_strength(self.strength)

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        """Raises InvalidConfig for a model without linear layers, or whose weights are no floats."""
        if self.strength == 0:
            yield Switch()
            return
        found = _linear_weights(lm)
        _ = lm.fingerprint  # it is remembered, so it must be taken of the model as it is
        with changing([(p, partial(self._changed, transposed=transposed)) for p, transposed in found]) as switch:
            yield switch

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "strength": self.strength}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> RoundedPatch:
        return cls(**spec, origin=origin)

    def _changed(self, weight: Tensor, *, transposed: bool) -> Tensor:
        rows = weight.T if transposed else weight
        rounded = _rounded(rows.float(), self.bits, self.group or rows.shape[1])
        if self.strength != 1:
            rounded = torch.lerp(rows.float(), rounded, self.strength)
        return (rounded.T if transposed else rounded).to(weight.dtype).contiguous()


def _rounded(rows: Tensor, bits: int, group: int) -> Tensor:
    ao: Any = importlib.import_module("torchao.quantization")
    block = (1, math.gcd(group, rows.shape[1]))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = rows.contiguous()
    scale, zero = ao.choose_qparams_affine(
        rows, ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR, block, torch.int8, lowest, highest
    )
    whole = ao.quantize_affine(rows, block, scale, zero, torch.int8, lowest, highest)
    found: Tensor = ao.dequantize_affine(whole, block, scale, zero, torch.int8, lowest, highest)
    return found


def _linear_weights(lm: LM) -> list[tuple[nn.Parameter, bool]]:
    """Each once, and whether it has a column an output, as a Conv1D has."""
    from transformers.pytorch_utils import Conv1D

    base: Any = root(lm.model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    apart = {id(p) for m in lm.model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    linear = [m for m in lm.model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) not in apart]
    found: dict[int, tuple[Any, bool]] = {id(m.weight): (m.weight, isinstance(m, Conv1D)) for m in linear}
    if not found:
        raise InvalidConfig(f"{lm.name} has no linear layers as Hugging Face models have them: quantise that model")
    if odd := [p.dtype for p, _ in found.values() if not p.is_floating_point()]:
        raise InvalidConfig(f"{lm.name} is quantised already, to {odd[0]}")
    return list(found.values())
