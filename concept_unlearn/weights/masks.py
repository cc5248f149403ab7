"""Which weights may change: the largest of all scores together, as a boolean mask for each parameter.

The cut is found exactly, without sorting and without all scores in one place: they are counted by the digits of their
bits, a parameter at a time. So a mapping may compute a score each time that it is asked for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import NonFinite
from .delta import Delta, Dense, Sparse

Masks = Mapping[str, Bool[Tensor, "*shape"]]

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_DIGIT = 16


def largest(scores: Mapping[str, Float[Tensor, "*shape"]], n: int) -> dict[str, Bool[Tensor, "*shape"]]:
    """True at the n entries of largest magnitude, over all parameters; of equal ones at those that come first.

    The scores are of one dtype, float32 or float64. Raises NonFinite.
    """
    cut, left = _cut(scores, n)
    masks = {}
    for name, score in scores.items():
        bits = _bits(score)
        mask = bits > cut
        equals = (bits == cut).nonzero()[:left, 0]
        mask[equals] = True
        left -= len(equals)
        masks[name] = mask.view(score.shape)
    return masks


def median(values: Mapping[str, Float[Tensor, "*shape"]]) -> float:
    """Of the magnitudes that are not zero, the lower one of two; 0 where there are none. Raises NonFinite."""
    n = sum(int(t.count_nonzero()) for t in values.values())
    if n == 0:
        return 0.0
    cut, _ = _cut(values, n // 2 + 1)
    dtype = next(iter(values.values())).dtype
    return float(torch.tensor([cut], dtype=_BITS[dtype]).view(dtype))


def shares(masks: Masks) -> dict[str, float]:
    """The share of True in each block, by its number, and in what is outside the blocks, by the module's name."""
    chosen: dict[str, list[int]] = {}
    for name, mask in masks.items():
        number = re.search(r"\.(\d+)\.", name)
        counts = chosen.setdefault(number[1] if number else name.rpartition(".")[0], [0, 0])
        counts[0] += int(mask.count_nonzero())
        counts[1] += mask.numel()
    return {group: n / n_all for group, (n, n_all) in chosen.items()}


def under(mask: Bool[Tensor, "*shape"], change: Float[Tensor, "*shape"]) -> Delta:
    """The change where the mask is True, and none elsewhere, in the form that takes less room, even in bfloat16."""
    if 16 * int(mask.count_nonzero()) + mask.numel() < 16 * mask.numel():
        return Sparse(change[mask], mask)
    return Dense(torch.where(mask, change, 0.0))


def _cut(values: Mapping[str, Tensor], n: int) -> tuple[int, int]:
    """The bits of the n-th largest magnitude, and how many of its equals are among the n largest."""
    for name, value in values.items():
        if not value.isfinite().all():
            raise NonFinite(f"the score of {name} is NaN or infinite")
        width = value.element_size() * 8
    cut, left = 0, n
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for value in values.values():
            bits = _bits(value) >> shift
            own = bits[bits >> _DIGIT == cut]
            counts += torch.bincount(own & (2**_DIGIT - 1), minlength=2**_DIGIT).cpu()
        down = counts.flip(0).cumsum(0)
        place = int((down < left).sum())
        left -= int(down[place - 1]) if place else 0
        cut = cut << _DIGIT | (2**_DIGIT - 1 - place)
    return cut, left


def _bits(value: Tensor) -> Int[Tensor, " n"]:
    """As integers in the order of the magnitudes."""
    return value.detach().abs().flatten().view(_BITS[value.dtype])
