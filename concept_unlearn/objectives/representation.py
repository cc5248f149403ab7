"""Move what the model thinks, not what it says: activations at one site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import SiteNotFound
from ..lm import LM, Site
from ..lm.locate import blocks, is_hooked
from ..step import Batch, Read, Step, Where
from .base import Objective


class _Representation(Objective):
    site: Site | None = None
    """By default the output of the block as deep as the 8th of 32, at least the third: the same for all such terms."""
    where: Literal["answer", "real", "own"] = "answer"
    """M_i: positions that predict the answer, all real ones as in the original, or the answer's own."""
    compat: Literal["open-unlearning"] | None = None
    """``open-unlearning``: the answer's own positions, and every sequence's sum divided by every sequence's length:
    mean_i(sum_i) mean_i(1 / n_i)."""

    def _at(self, lm: LM) -> Site:
        if self.site is not None:
            return self.site
        return Site("resid_post", min(max(round(lm.n_layers * 7 / 32), 2), lm.n_layers - 1))

    @property
    def _where(self) -> Where:
        return self.where if self.compat is None else "own"

    def _distance(self, step: Step, split: str, h: Float[Tensor, "n d"], to: Float[Tensor, "*n d"]) -> Tensor:
        """mean_i (1 / |M_i|) sum_{s in M_i} (1 / d) ||h_s - to_s||^2"""
        squares = (h - to).square().mean(-1)
        if self.compat is None:
            return step.seq_mean(split, squares, self._where)

        def inverses(batch: Batch) -> Tensor:
            lengths = batch.lengths(self._where).to(squares)
            return torch.where(lengths > 0, 1 / lengths, 0.0).sum()

        sums = step.mean(split, step.per_sequence(split, squares, self._where), self._where)
        return sums * step.total(split, inverses) / step.n_sequences(split, self._where)


class RMU(_Representation):
    """Representation misdirection, L = mean_i (1/|M_i|) sum_s (1/d) ||h_{i,s} - k u||^2: WMDP (arXiv 2403.03218)."""

    k: float = 20.0
    """Norm of the target; what is useful grows with the norm of the activations there."""
    seed: int = 0
    """Of u, drawn from U[0, 1)^d and divided by its norm."""

    def reads(self, lm: LM) -> Sequence[Read]:
        return (Read("forget", self._at(lm), self._where),)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        h = step.activations("forget", self._at(step.lm), self._where)
        return self._distance(step, "forget", h, self.k * _direction(self.seed, h.shape[-1]).to(h))

    def trains(self, lm: LM) -> Sequence[str]:
        """The output matrices of the last three MLPs before the site. Raises SiteNotFound where there are none."""
        site = self._at(lm)
        before = [layer for layer in range(lm.n_layers) if Site("mlp_out", layer) <= site]
        if not before:
            raise SiteNotFound(f"no MLP comes before {site}, so there is nothing to train")
        return tuple(_mlp_output(lm, layer) for layer in before[-3:])


class RetainEmbedding(_Representation):
    """Think as before, R = mean_i (1/|M_i|) sum_s (1/d) ||h_{i,s} - h^0_{i,s}||^2: WMDP (arXiv 2403.03218)."""

    retains: ClassVar[bool] = True

    weight: float = 100.0

    def reads(self, lm: LM) -> Sequence[Read]:
        site = self._at(lm)
        return (Read("retain", site, self._where), Read("retain", site, self._where, reference=True))

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        site = self._at(step.lm)
        h, h0 = (read("retain", site, self._where) for read in (step.activations, step.reference_activations))
        return self._distance(step, "retain", h, h0)


@lru_cache
def _direction(seed: int, d: int) -> Float[Tensor, " d"]:
    """u: the same for the same seed on every machine, in the positive orthant, of norm 1."""
    return normalize(torch.rand(d, generator=torch.Generator().manual_seed(seed)), dim=0)


def _mlp_output(lm: LM, layer: int) -> str:
    """The name of the matrix with which a block's MLP writes to the residual stream."""
    names = {parameter: name for name, parameter in lm.model.named_parameters()}
    for mlp in _mlps(lm, layer):
        found = [p for module in mlp.modules() for p in module.parameters(recurse=False) if _writes(module, p, lm)]
        if found:
            return names[found[-1]]
    raise SiteNotFound(f"{type(lm.model).__name__}: the MLP of block {layer} has no matrix that ends in the residual")


def _mlps(lm: LM, layer: int) -> Iterator[nn.Module]:
    """Where the weights of a block's MLP are: one module, or its two layers right in the block."""
    if is_hooked(lm.model):
        yield from (m for name, m in blocks(lm.model)[layer].named_children() if name == "mlp")
    else:
        yield from (lm.locate(Site(stream, layer)) for stream in ("mlp_in", "mlp_out"))


def _writes(module: nn.Module, parameter: nn.Parameter, lm: LM) -> bool:
    """Is it a matrix onto d_model? nn.Linear has outputs first, others last, experts stacked either way."""
    outputs = parameter.shape[:1] if isinstance(module, nn.Linear) else parameter.shape[1:]
    return parameter.ndim > 1 and lm.d_model in outputs
