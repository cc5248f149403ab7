"""Rows of token ids as a batch, which of its positions are read, and what is read of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from ..lm import Site

UNSUPERVISED = -100

Where = Literal["answer", "content", "real", "own", "all"]
"""Which positions are read: those that predict a supervised token, those that predict any real one, all real tokens,
supervised tokens' own positions, or all there are, padding too. The last two are other people's mistakes (``compat``).
"""


class Batch(NamedTuple):
    """Rows of one split, padded on either side."""

    ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    """The ids again, aligned with them, -100 where a token is not supervised."""
    mask: Bool[Tensor, "batch seq"]
    """True at real tokens."""
    rows: tuple[int, ...] = ()
    """Which rows of its split these are."""

    def positions(self, where: Where = "answer") -> Bool[Tensor, "batch seq"]:
        """The positions whose output is read; logits at position s predict token s + 1."""
        supervised = (self.labels != UNSUPERVISED) & self.mask
        match where:
            case "answer":
                return pad(supervised[:, 1:], (0, 1)) & self.mask  # nothing predicts the first, padded or not
            case "content":
                return pad(self.mask[:, 1:], (0, 1)) & self.mask
            case "real":
                return self.mask
            case "own":
                return supervised
            case "all":
                return torch.ones_like(self.mask)

    def lengths(self, where: Where = "answer") -> Int[Tensor, " batch"]:
        """How many positions of each sequence are read: n_i."""
        return self.positions(where).sum(-1)


class Read(NamedTuple):
    """One thing that an objective reads: declared, so that it can be computed in the same pass, or ahead."""

    split: str
    what: Literal["nll", "logits"] | Site = "nll"
    where: Where = "answer"
    reference: bool = False
