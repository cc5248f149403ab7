"""Directions without a dictionary, fitted from the same statistics: the comparators of every SAE edit."""

from __future__ import annotations

import torch

from ..dictionaries import ColumnSlice, direction
from .stats import Stats

_SINK = 5.0
"""Tokens above this many median norms are sinks and are left alone, as they are in dictionary training."""


def difference_of_means(stats: Stats) -> ColumnSlice:
    """r = mean over forget tokens minus mean over retain tokens. A unit of the feature is the whole of r.

    ``Zero`` removes the component along r; ``Shift(by=-1)`` subtracts r.
    """
    r = stats.forget.x_mean - stats.retain.x_mean
    return direction(stats.site, r / r.square().sum(), r, max_norm=_SINK * stats.retain.median_norm)


def leace(stats: Stats) -> ColumnSlice:
    """LEACE (arXiv 2306.03819, theorem 4.3) for the label forget or retain, a rank-one affine projection.

    x' = x - W^+ u (u' W (x - E x)), u = W S_xz / |W S_xz|, W = S_xx^(-1/2): with ``Zero`` no linear probe can
    tell the two corpora apart better than a constant. Tokens count equally, in float64.
    """
    f, r = stats.forget, stats.retain
    share = f.n_tokens / (f.n_tokens + r.n_tokens)
    mean = share * f.x_mean.double() + (1 - share) * r.x_mean.double()
    second = share * f.x_second + (1 - share) * r.x_second
    covariance = second - mean.outer(mean)
    cross = share * (1 - share) * (f.x_mean.double() - r.x_mean.double())
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * 1e-10
    root = values.clamp(min=0).sqrt()
    whiten = (vectors * torch.where(kept, 1 / root, 0.0)) @ vectors.T
    colour = (vectors * torch.where(kept, root, 0.0)) @ vectors.T
    u = whiten @ cross
    u = u / u.norm()
    read = whiten @ u
    return direction(stats.site, read, colour @ u, bias=-float(read @ mean), max_norm=_SINK * stats.retain.median_norm)
