"""What the features of a dictionary do on forget and on retain text: one streaming pass, O(n_features) memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations import stream
from ..data.encode import encode_text
from ..data.examples import Passage
from ..data.scope import Scope
from ..dictionaries import Dictionary
from ..dictionaries.base import check_width
from ..errors import DictionaryMismatch, EmptyData
from ..lm import LM, Site
from ..tracking import Progress

_BINS_PER_OCTAVE = 4
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -10, 14


@dataclass(frozen=True)
class CorpusStats:
    """Sums over the tokens of one corpus; ``peaks`` counts sequences by the bin of their largest activation."""

    n_tokens: int
    n_sequences: int
    count: Int[Tensor, " n_features"]
    total: Float[Tensor, " n_features"]
    squares: Float[Tensor, " n_features"]
    largest: Float[Tensor, " n_features"]
    sequences: Int[Tensor, " n_features"]
    peaks: Int[Tensor, "n_features bins"]
    x_mean: Float[Tensor, " d"]
    x_second: Float[Tensor, "d d"]
    """E[x x'] in float64."""
    median_norm: float

    @property
    def rate(self) -> Float[Tensor, " n_features"]:
        """Share of tokens on which the feature fires."""
        return self.count / self.n_tokens

    @property
    def mean(self) -> Float[Tensor, " n_features"]:
        return self.total / self.n_tokens

    @property
    def mean_square(self) -> Float[Tensor, " n_features"]:
        return self.squares / self.n_tokens


@dataclass(frozen=True)
class Stats:
    """What the features of one dictionary do on forget and on retain text."""

    dictionary: str
    site: Site
    forget: CorpusStats
    retain: CorpusStats
    attribution: Float[Tensor, " n_features"] | None = None
    """Effect of each feature on the log-probability of forget answers, see ``features.attribution``."""

    @property
    def n_features(self) -> int:
        return len(self.forget.count)


class CorpusFitter:
    """``update`` with the rows of whole sequences, then ``stats()``."""

    def __init__(self, dictionary: Dictionary, max_norm: float) -> None:
        self._dictionary, self._max_norm = dictionary, max_norm
        n, d = dictionary.n_features, dictionary.d_in
        self._n_tokens = self._n_sequences = 0
        self._count = torch.zeros(n, dtype=torch.long)
        self._sums = torch.zeros(2, n, dtype=torch.float64)
        self._largest = torch.zeros(n)
        self._sequences = torch.zeros(n, dtype=torch.long)
        self._peaks = torch.zeros(n, _n_bins(), dtype=torch.int32)
        self._x_sum = torch.zeros(d, dtype=torch.float64)
        self._x_second = torch.zeros(d, d, dtype=torch.float64)
        self._norms: list[Tensor] = []

    def update(self, x: Float[Tensor, "tokens d"], sequence: Int[Tensor, " tokens"]) -> None:
        norms = x.float().norm(dim=-1)
        self._norms.append(norms.cpu())
        x, sequence = x[norms <= self._max_norm], sequence[norms <= self._max_norm]
        if not len(x):
            return
        acts = self._dictionary.encode(x).float()
        _, local = sequence.unique_consecutive(return_inverse=True)
        n_sequences = int(local[-1]) + 1
        peak = acts.new_zeros(n_sequences, acts.shape[1])
        peak.scatter_reduce_(0, local[:, None].expand_as(acts), acts, reduce="amax")
        self._n_tokens += len(x)
        self._n_sequences += n_sequences
        self._count += (acts > 0).sum(0).cpu()
        self._sums += torch.stack([acts.sum(0), acts.square().sum(0)]).double().cpu()
        self._largest = torch.maximum(self._largest, acts.amax(0).cpu())
        self._sequences += (peak > 0).sum(0).cpu()
        bins = _bin(peak).cpu()
        self._peaks.scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.int32))
        wide = x.double()
        self._x_sum += wide.sum(0).cpu()
        self._x_second += (wide.T @ wide).cpu()

    def stats(self) -> CorpusStats:
        if not self._n_tokens:
            raise EmptyData("no token was left to measure")
        total, squares = self._sums
        return CorpusStats(
            n_tokens=self._n_tokens,
            n_sequences=self._n_sequences,
            count=self._count,
            total=total.float(),
            squares=squares.float(),
            largest=self._largest,
            sequences=self._sequences,
            peaks=self._peaks,
            x_mean=(self._x_sum / self._n_tokens).float(),
            x_second=self._x_second / self._n_tokens,
            median_norm=float(torch.cat(self._norms).median()),
        )


def measure(
    lm: LM, dictionary: Dictionary, scope: Scope, *, batch_tokens: int = 2048, progress: Progress | None = None
) -> Stats:
    """One pass over the scope's forget and retain passages. ``progress`` hears of passages."""
    return measure_all(lm, [dictionary], scope, batch_tokens=batch_tokens, progress=progress)[0]


def measure_all(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    scope: Scope,
    *,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> tuple[Stats, ...]:
    """Several dictionaries, at the same or other sites, in the same pass over the model.

    Raises DictionaryMismatch for one of another width, or that explains none of the variance it finds.
    """
    ready = [dictionary.to(lm.device) for dictionary in dictionaries]
    forget, retain = (
        _fit(lm, ready, _encode(lm, passages), batch_tokens, progress)
        for passages in (scope.forget, (*scope.retain, *scope.near))
    )
    return tuple(
        Stats(dictionary.name, dictionary.site, f, r) for dictionary, f, r in zip(ready, forget, retain, strict=True)
    )


def _encode(lm: LM, passages: Iterable[Passage]) -> list[list[int]]:
    return [encode_text(lm.tokenizer, p.text, p.prompt) for p in passages]


def _fit(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Sequence[int]],
    batch_tokens: int,
    progress: Progress | None,
) -> list[CorpusStats]:
    fitters = [CorpusFitter(d, d.max_norm) for d in dictionaries]
    sites = sorted({d.site for d in dictionaries})
    first = True
    for rows in stream(lm, sites, texts, batch_tokens=batch_tokens, progress=progress):
        for dictionary, fitter in zip(dictionaries, fitters, strict=True):
            x = rows.activations[dictionary.site]
            if first:
                check_fit(dictionary, x)
            fitter.update(x, rows.sequence)
        first = False
    return [fitter.stats() for fitter in fitters]


def check_fit(dictionary: Dictionary, x: Float[Tensor, "tokens d"]) -> None:
    """Raises DictionaryMismatch if the dictionary was plainly not made for these activations."""
    check_width(dictionary, x)
    if dictionary.site_out != dictionary.site:
        return  # a transcoder predicts another site: what it reads does not tell how well
    x = x.float()
    x = x[x.norm(dim=-1) <= dictionary.max_norm]
    explained = variance_explained(x, dictionary.decode(dictionary.encode(x), x).float())
    if len(x) > 1 and explained < 0:
        raise DictionaryMismatch(
            f"{dictionary.name} explains {explained:.0%} of the variance at {dictionary.site} of this model, less "
            "than nothing: it was trained on another model or site"
        )


def variance_explained(x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens d"]) -> float:
    """1 - sum ||x - y||^2 / sum ||x - mean(x)||^2."""
    return 1 - float((x - y).square().sum() / (x - x.mean(0)).square().sum().clamp(min=1e-12))


def _n_bins() -> int:
    return 1 + (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE


def _bin(peak: Float[Tensor, "n n_features"]) -> Int[Tensor, "n n_features"]:
    """0 for no activation, then four bins to a doubling."""
    log = (peak.clamp(min=2.0**_LOWEST_OCTAVE).log2() - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE
    return torch.where(peak > 0, log.long().clamp(max=_n_bins() - 2) + 1, 0)
