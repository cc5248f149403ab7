"""Where chosen features fire most: one passage after another, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import EmptyData
from .rate import Rate, firing_rate

_BINS_PER_OCTAVE = 2
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -10, 14
N_BINS = (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE


class Peak(NamedTuple):
    """The strongest token of a passage, and what the feature does around it."""

    passage: int
    position: int
    """Among the tokens of the passage without BOS."""
    acts: list[float]
    """From ``window`` tokens before it to as many after; 0 where the passage has none."""


class ContextFitter:
    """``update`` with the rows of whole passages, then ``peaks``, ``rate`` and ``density`` of each feature.

    Of each feature the ``n`` passages with the largest activation are held, equal ones in order, each by its peak.
    """

    def __init__(self, n_features: int, *, n: int, window: int, skip: Sequence[int] = ()) -> None:
        """``skip``: of each passage so many tokens at its beginning are counted and shown, and are no peak."""
        k = n_features
        self._n, self._window, self._skip = n, window, torch.tensor(skip, dtype=torch.long)
        self._n_tokens = self._n_passages = 0
        self._size_squared = 0.0
        self._fired = torch.zeros(k, dtype=torch.long)
        self._sums = torch.zeros(2, k, dtype=torch.float64)
        self._bins = torch.zeros(k, N_BINS, dtype=torch.long)
        self._value = torch.full((k, n), -torch.inf)
        self._passage = torch.full((k, n), -1)
        self._position = torch.zeros(k, n, dtype=torch.long)
        self._acts = torch.zeros(k, n, 2 * window + 1)

    def update(
        self,
        acts: Float[Tensor, "tokens k"],
        measured: Bool[Tensor, " tokens"],
        passage: Int[Tensor, " tokens"],
    ) -> None:
        """Tokens that are not ``measured`` are shown and not counted; nothing fires on them."""
        acts = torch.where(measured[:, None], acts.float(), 0.0).clamp(min=0).cpu()
        numbers, local, lengths = passage.cpu().unique_consecutive(return_inverse=True, return_counts=True)
        begins = lengths.cumsum(0) - lengths
        position = torch.arange(len(local)) - begins[local] + self._window
        rows = acts.new_zeros(len(numbers), int(lengths.max()) + 2 * self._window, acts.shape[1])
        rows[local, position] = acts
        self._count(rows, torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, local, measured.cpu().double()))
        self._bin(acts)
        skip = self._skip[numbers] if len(self._skip) else torch.zeros_like(numbers)
        self._keep_largest(rows, numbers, skip)

    def rate(self, feature: int) -> Rate:
        """Raises EmptyData where no token was measured."""
        if not self._n_tokens:
            raise EmptyData("no token was left to measure")
        return firing_rate(
            fired=int(self._fired[feature]), tokens=self._n_tokens, passages=self._n_passages,
            fired_squared=float(self._sums[0, feature]), fired_by_size=float(self._sums[1, feature]),
            size_squared=self._size_squared,
        )  # fmt: skip

    def density(self, feature: int) -> list[int]:
        """Tokens by activation, two bins to a doubling; see ``edge``."""
        found: list[int] = self._bins[feature].tolist()
        return found

    def peaks(self, feature: int) -> list[Peak]:
        """The strongest first."""
        n = int(self._value[feature].isfinite().sum())
        held = (self._passage[feature, :n], self._position[feature, :n], self._acts[feature, :n])
        return [Peak(*row) for row in zip(*(t.tolist() for t in held), strict=True)]

    def _count(self, rows: Float[Tensor, "passages seq k"], size: Float[Tensor, " passages"]) -> None:
        fired = (rows > 0).sum(1)
        self._n_tokens += int(size.sum())
        self._n_passages += int((size > 0).sum())
        self._size_squared += float(size.square().sum())
        self._fired += fired.sum(0)
        self._sums += torch.stack([fired.double().square().sum(0), size @ fired.double()])

    def _bin(self, acts: Float[Tensor, "tokens k"]) -> None:
        token, feature = (acts > 0).nonzero(as_tuple=True)
        octave = acts[token, feature].double().log2() - _LOWEST_OCTAVE
        bins = (octave * _BINS_PER_OCTAVE).floor().long().clamp(0, N_BINS - 1)
        flat = torch.bincount(feature * N_BINS + bins, minlength=self._bins.numel())
        self._bins += flat.view_as(self._bins)

    def _keep_largest(
        self, rows: Float[Tensor, "passages seq k"], numbers: Int[Tensor, " passages"], skip: Int[Tensor, " passages"]
    ) -> None:
        n, w = self._n, self._window
        is_text = torch.arange(rows.shape[1]) >= skip[:, None] + w
        peak, at = torch.where(is_text[..., None], rows, 0.0).max(1)
        value = torch.cat([self._value, torch.where(peak > 0, peak, -torch.inf).T], 1)
        passage = torch.cat([self._passage, numbers.expand(len(value), -1)], 1)
        by_number = passage.argsort(stable=True, dim=1)
        best = value.gather(1, by_number).argsort(stable=True, dim=1, descending=True)[:, :n]
        chosen = by_number.gather(1, best)
        self._value, self._passage = value.gather(1, chosen), passage.gather(1, chosen)
        self._position = torch.cat([self._position, at.T - w], 1).gather(1, chosen)
        old = chosen.clamp(max=n - 1)[..., None].expand(-1, -1, 2 * w + 1)
        self._acts = self._acts.gather(1, old)
        is_new = (chosen >= n) & self._value.isfinite()
        feature, _ = is_new.nonzero(as_tuple=True)
        new = chosen[is_new] - n
        around = at[new, feature][:, None] + torch.arange(-w, w + 1)
        self._acts[is_new] = rows[new[:, None], around, feature[:, None]]


def edge(i: int) -> float:
    """The lower end of a bin."""
    return float(2.0 ** (_LOWEST_OCTAVE + i / _BINS_PER_OCTAVE))
