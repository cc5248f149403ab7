"""Several changes of the same model made into one, tensor by tensor.

An input is a mapping of parameter names to changes; a tensor that it lacks counts as zeros, so a mean divides by the
number of inputs, not by the number of those that have the tensor. Sums are taken in float64, so that neither the order
of the inputs nor their number shows; a result is float32, or float64 where an input is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..errors import InvalidConfig, PatchMismatch

Tensors = Mapping[str, Tensor]


def total(inputs: Sequence[Tensors]) -> dict[str, Tensor]:
    return _by_name(inputs, _sum)


def mean(inputs: Sequence[Tensors]) -> dict[str, Tensor]:
    return _by_name(inputs, lambda found: _sum(found) / len(inputs))


def task_arithmetic(inputs: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of weight * input (arXiv 2212.04089). Raises InvalidConfig unless there is a weight for each input."""
    if len(weights) != len(inputs):
        raise InvalidConfig(f"task arithmetic takes one weight an input: {len(inputs)}; given: {len(weights)}")
    return _by_name(inputs, lambda found: _sum({i: weights[i] * t for i, t in found.items()}))


def ties(inputs: Sequence[Tensors], density: float = 1.0) -> dict[str, Tensor]:
    """Trim, elect, merge (TIES, arXiv 2306.01708).

    Of every tensor of every input the ``int(density * numel)`` entries of largest magnitude are kept; each entry's
    sign is that of their sum; what is kept, not zero and of that sign is averaged. A sum of zero elects nothing and
    gives zero. Raises InvalidConfig unless 0 <= density <= 1.
    """
    if not 0 <= density <= 1:
        raise InvalidConfig(f"density is the share of entries that are kept, 0 to 1; given: {density}")

    def merged(found: dict[int, Tensor]) -> Tensor:
        kept = {i: _trimmed(t, density) for i, t in found.items()}
        elected = _sum(kept).sign()
        agreeing = {i: torch.where((t.sign() == elected) & (t != 0), t, 0.0) for i, t in kept.items()}
        count = _sum({i: (t != 0).double() for i, t in agreeing.items()})
        return _sum(agreeing) / count.clamp(min=1)

    return _by_name(inputs, merged)


def _by_name(inputs: Sequence[Tensors], merged: Callable[[dict[int, Tensor]], Tensor]) -> dict[str, Tensor]:
    """``merged`` is given of each name the tensors in float64, by the number of their input."""
    if not inputs:
        raise InvalidConfig("there is nothing to merge")
    out = {}
    for name in dict.fromkeys(name for given in inputs for name in given):
        found = {i: given[name] for i, given in enumerate(inputs) if name in given}
        if len(shapes := {tuple(t.shape) for t in found.values()}) > 1:
            raise PatchMismatch(f"{name} has different shapes, so the changes are of different models: {shapes}")
        wide = any(t.dtype == torch.float64 for t in found.values())
        out[name] = merged({i: t.double() for i, t in found.items()}).to(torch.float64 if wide else torch.float32)
    return out


def _sum(found: dict[int, Tensor]) -> Tensor:
    return reduce(torch.add, found.values())


def _trimmed(values: Tensor, density: float) -> Tensor:
    if (n := int(density * values.numel())) == values.numel():
        return values
    flat = values.flatten()
    kept = flat.abs().topk(n, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(values)
