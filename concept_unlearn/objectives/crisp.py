"""Quieten chosen features of a dictionary by training the model that feeds it (CRISP, arXiv 2508.13650)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..dictionaries import load_dictionary
from ..dictionaries.base import check_width
from ..dictionaries.sae import WholeSlice
from ..dictionaries.slice import Slice
from ..lm import LM
from ..step import Read, Step
from .base import Objective


class LowerFeatures(Objective):
    """Make features fall silent, L = (1 / |M|) sum_{s in M} sum_{i in S} a_i(h_s), a = enc(h), on forget text.

    M is every token but the first of a sequence, which is a sink or opens the text, and sinks further on. The original
    averages over the (token, feature) pairs that fire; this counts those that do not, so that it falls to 0 as they do.
    """

    dictionary: str
    """A name as ``load_dictionary`` takes it."""
    features: tuple[int, ...] = Field(min_length=1)
    """S."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", self._slice.site, "real"),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        chosen, h = self._slice, step.activations("forget", self._slice.site, "real")
        chosen = chosen.to(h.device)
        check_width(chosen, h)
        seen = (step.order("forget", "real") > 0) & (h.detach().norm(dim=-1) <= chosen.max_norm)
        total = torch.where(seen, activations(chosen, h).sum(-1), 0.0).sum()
        return total / step.total("forget", lambda b: (b.lengths("real") - 1).clamp(min=0).sum())

    @property
    def _slice(self) -> Slice:
        return _slice(self.dictionary, self.features)


def activations(chosen: Slice, h: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    """a_S(h) with its gradient, also where features compete: which of them won is then a constant."""
    with torch.autocast(h.device.type, enabled=False):
        if not isinstance(chosen, WholeSlice):
            return chosen.encode(h).acts.to(h.dtype)
        won = chosen.encode(h.detach()).acts != 0
        return torch.where(won, chosen.columns.encode(h).acts.to(h.dtype), 0.0)


@lru_cache(maxsize=16)
def _slice(dictionary: str, features: tuple[int, ...]) -> Slice:
    """On the CPU, where it is small; the dictionary itself is let go."""
    return load_dictionary(dictionary, device="cpu").slice(features)
