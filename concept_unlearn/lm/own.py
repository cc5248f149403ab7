"""Which positions of a pass are the prompt's own, where others were put between them on the way in."""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn


class Inserted(NamedTuple):
    """What was put into each sequence of a pass, to be left out of what comes of it."""

    at: Int[Tensor, " batch"]
    width: int
    length: int
    """Of the pass without it."""

    def left_out(self, x: Shaped[Tensor, "batch more d"]) -> Shaped[Tensor, "batch kept d"]:
        """Of the last positions of such a pass, the own ones; at least as many as are given beyond the width."""
        kept = x.shape[1] - self.width
        own = torch.arange(self.length - kept, self.length, device=x.device)
        place = own + self.width * (own >= self.at.to(x.device)[:, None]) - (self.length - kept)
        return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))


class Insertion(Protocol):
    """At work on a model."""

    inserted: Inserted | None
    """Into the pass under way, or else the last one."""


_AT_WORK: weakref.WeakKeyDictionary[nn.Module, list[Insertion]] = weakref.WeakKeyDictionary()


def insertions(model: nn.Module) -> list[Insertion]:
    """Those at work on a model, the innermost first: a list that changes as they come and go."""
    return _AT_WORK.setdefault(getattr(model, "_orig_mod", model), [])


def own(x: Shaped[Tensor, "batch seq d"], at_work: list[Insertion]) -> Shaped[Tensor, "batch own d"]:
    """Of an activation at all positions of a pass, that of the prompt's own tokens."""
    for insertion in at_work:
        if insertion.inserted is not None:
            x = insertion.inserted.left_out(x)
    return x
