"""Random numbers without a state: each is a function of a key and an index, so it is the same however text is run."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..lm import Context

_GOLDEN = -0x61C8864680B583EB
"""2^64 over the golden ratio, as a signed integer: the increment of SplitMix64."""


def prefix_keys(context: Context) -> Int[Tensor, "batch seq"] | None:
    """For each token of the prompt, a key of it and all that comes before it: padding takes no part, and a prompt that
    comes in pieces has the keys that it has in one.

    The sum of hashes of (token, position), modulo 2^64. None where a pass came as embeddings.
    """
    if context.ids is None:
        return None
    own = context.real & context.prompt
    rows = context.memory.rows
    start = rows.get("noise_start", torch.zeros_like(own[:, 0], dtype=torch.long))
    before = rows.get("noise_key", torch.zeros_like(start))
    position = start[:, None] + own.long().cumsum(1)
    keys = before[:, None] + torch.where(own, mix(mix(context.ids.long()) + position), 0).cumsum(1)
    rows["noise_start"], rows["noise_key"] = position[:, -1], keys[:, -1]
    return keys


def gaussian(keys: Int[Tensor, "*batch"], n: int, *, seed: int) -> Float[Tensor, "*batch n"]:
    """n independent standard normal numbers a key, by Box and Muller."""
    index = torch.arange(2 * n, device=keys.device)
    bits = mix(mix(keys + mix(torch.tensor(seed, device=keys.device)))[..., None] + index)
    uniform = ((_shifted(bits, 11)).double() + 0.5) * 2.0**-53
    radius, angle = uniform[..., :n], uniform[..., n:]
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).float()


def mix(z: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """SplitMix64 (Steele, Lea and Flood 2014): every bit of what comes out depends on every bit of what goes in."""
    z = z + _GOLDEN
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31)


def _shifted(z: Int[Tensor, "*batch"], by: int) -> Int[Tensor, "*batch"]:
    """Right, filled with zeros: torch fills with the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
