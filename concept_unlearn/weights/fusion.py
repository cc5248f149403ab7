"""Linear maps of several requests made into one by least squares, from second moments alone.

Equation W_m = argmin sum_i |X_i W - X_i W_i|_F^2 of EUL (arXiv 2310.20150), as in RegMean (arXiv 2212.09849): of the
inputs X_i only the Gram matrices G_i = X_i^T X_i are needed, so no data are kept. They still tell the second moments of
the data; they can be thrown away when nothing more is to be fused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EmptyData, InvalidConfig, NonFinite, PatchMismatch

RIDGE = 1e-6


def with_ones(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d+1"]:
    """The inputs of a map with a bias: [W; b] is one matrix when a column of ones is appended."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def gram(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """X^T X in float64. Of several batches they add up to that of all."""
    wide = x.detach().double()
    return wide.T @ wide


def fuse_maps(
    grams: Sequence[Float[Tensor, "d d"]], maps: Sequence[Float[Tensor, "d out"]], *, ridge: float = RIDGE
) -> Float[Tensor, "d out"]:
    """W_m of (sum_i G_i + rho I) W_m = sum_i G_i W_i + rho mean_i W_i, rho = ridge * trace(sum_i G_i) / d, in float64.

    Towards the mean where the inputs say nothing, so one map or equal maps come back as they are. With a ridge of 0
    a singular sum has many solutions: it is the one of least norm.
    Raises PatchMismatch for unequal shapes, EmptyData where no input was seen, NonFinite, or InvalidConfig.
    """
    if not maps or len(grams) != len(maps) or not 0 <= ridge < float("inf"):
        raise InvalidConfig(
            f"to fuse takes maps, a Gram matrix for each and a ridge of 0 or more; given: {len(maps)} maps, "
            f"{len(grams)} Gram matrices, a ridge of {ridge}"
        )
    _check_shapes(grams, maps)
    G = torch.stack([g.double() for g in grams])
    W = torch.stack([w.double() for w in maps])
    if not (G.isfinite().all() and W.isfinite().all()):
        raise NonFinite("a map to fuse, or its Gram matrix, holds NaN or infinity")
    total = G.sum(0)
    if not total.any():
        raise EmptyData("the Gram matrices are zero: no input was seen, so nothing says how to fuse")
    rho = ridge * total.trace() / len(total)
    left = total + rho * torch.eye(len(total), dtype=total.dtype, device=total.device)
    right = (G @ W).sum(0) + rho * W.mean(0)
    if ridge:
        factor, failed = torch.linalg.cholesky_ex(left)
        if not failed:
            return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(left, hermitian=True)
    return inverse @ right


def _check_shapes(grams: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
    shapes = {tuple(w.shape) for w in maps}
    d = maps[0].shape[0]
    if len(shapes) > 1 or maps[0].ndim != 2 or any(g.shape != (d, d) for g in grams):
        found = sorted({tuple(g.shape) for g in grams})
        raise PatchMismatch(f"only maps of one shape [d, out] and Gram matrices [d, d] are fused: {shapes}, {found}")
