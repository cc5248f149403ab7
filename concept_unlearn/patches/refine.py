"""Both maps of fused bottlenecks moved together, towards what each request's adapter did on inputs of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EmptyData
from .adapter import Adapter, Map


def drawn(gram: Float[Tensor, "d+1 d+1"], n: int, *, seed: int) -> Float[Tensor, "n d"]:
    """Normal inputs with the mean and covariance that a Gram matrix with a column of ones tells."""
    count = gram[-1, -1].double()
    if count <= 0:
        raise EmptyData("the Gram matrices are zero: no input was seen, so nothing says how to refine")
    mean = gram[-1, :-1].double() / count
    values, vectors = torch.linalg.eigh(gram[:-1, :-1].double() / count - mean.outer(mean))
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: Tensor = noise @ root.T + mean
    return found


def error(
    adapter: Adapter, adapters: Sequence[Adapter], inputs: Sequence[Float[Tensor, "n d"]], counts: Sequence[float]
) -> Float[Tensor, ""]:
    """sum_i n_i mean |A(x) - A_i(x)|^2 over the inputs x of request i, which had n_i tokens, by that of A = 0."""
    wide = [_wide(a) for a in adapters]
    own, inputs = _wide(adapter), [x.cpu().double() for x in inputs]
    missed = sum(n * (own(x) - a(x)).square().sum(-1).mean() for a, x, n in zip(wide, inputs, counts, strict=True))
    whole = sum(n * a(x).square().sum(-1).mean() for a, x, n in zip(wide, inputs, counts, strict=True))
    return torch.as_tensor(missed) / torch.as_tensor(whole).clamp(min=1e-30)


def refined(
    fused: Adapter, adapters: Sequence[Adapter], inputs: Sequence[Float[Tensor, "n d"]], counts: Sequence[float],
    steps: int,
) -> Adapter:  # fmt: skip
    """The adapter after so many steps of L-BFGS on ``error``, all maps at once; never worse there than it was."""
    start = {name: t.detach().cpu().double() for name, t in fused.tensors().items()}
    parameters = {name: t.clone().requires_grad_(True) for name, t in start.items()}
    optimiser = torch.optim.LBFGS(list(parameters.values()), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = error(fused.of(parameters), adapters, inputs, counts)
        found.backward()
        return found

    with torch.enable_grad():
        optimiser.step(loss)
    found = fused.of({name: p.detach() for name, p in parameters.items()})
    with torch.no_grad():
        before, after = (float(error(a, adapters, inputs, counts)) for a in (fused, found))
    if not after < before:
        return fused
    dtype = fused.dtype
    return fused.of({name: t.to(dtype) for name, t in found.tensors().items()})


def _wide(adapter: Adapter) -> Adapter:
    return type(adapter)(
        {name: Map(m.weight.cpu().double(), m.bias.cpu().double()) for name, m in adapter.maps.items()}
    )
