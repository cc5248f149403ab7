"""Masks on disk: one bit an entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def packed(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " n_bytes"]:
    """Eight entries a byte in flat order, the first in the lowest bit; the last byte is filled up with zeros."""
    flat = mask.flatten()
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (bits << _places(bits)).sum(-1, dtype=torch.uint8)


def unpacked(content: UInt8[Tensor, " n_bytes"], shape: Sequence[int]) -> Bool[Tensor, "*shape"]:
    bits = (content[:, None] >> _places(content)) & 1
    return bits.flatten()[: math.prod(shape)].view(tuple(shape)).bool()


def _places(like: Tensor) -> UInt8[Tensor, " 8"]:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
