"""What features write: their decoder rows, which of them point the same way, and which tokens they speak for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...dictionaries import Codebook, Dictionary
from ...errors import NonFinite
from ...lm import LM, Site
from ...lm.locate import is_hooked, root

_RESIDUAL = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Streams that are written to, or are, the residual one: what the unembedding reads."""
_CHUNK = 64

Weighed = tuple[int, float]
"""A token or a feature, by how much."""


@torch.no_grad()
def decoder_rows(dictionary: Dictionary) -> Float[Tensor, "n_features d_out"]:
    """What a unit of each feature adds. Raises NonFinite."""
    if isinstance(dictionary, Codebook):
        codes = torch.eye(dictionary.n_features, device=dictionary.codes.device)
        rows = dictionary.decode(codes, codes) - dictionary.b_dec
    else:
        rows = dictionary.slice(range(dictionary.n_features)).W_dec
    if not rows.isfinite().all():
        raise NonFinite(f"the decoder of {dictionary.name} holds NaN or infinite numbers")
    return rows.detach().float()


def nearest(rows: Float[Tensor, "n_features d_out"], features: Sequence[int], n: int) -> list[list[Weighed]]:
    """By cosine of decoder rows, whatever their norms; a row of zeros is near nothing."""
    unit = normalize(rows, dim=-1, eps=1e-12)
    alive = rows.norm(dim=-1) > 0
    found = []
    for start in range(0, len(features), _CHUNK):
        chosen = torch.tensor(features[start : start + _CHUNK], device=rows.device)
        cosine = unit[chosen] @ unit.T
        cosine[:, ~alive] = -torch.inf
        cosine[~alive[chosen]] = -torch.inf
        cosine[torch.arange(len(chosen)), chosen] = -torch.inf
        found += _largest(cosine, n)
    return found


@torch.no_grad()
def lens(
    lm: LM, rows: Float[Tensor, "k d_out"], site: Site, n: int
) -> tuple[list[list[Weighed]], list[list[Weighed]]] | None:
    """Of each row the ``n`` tokens that it raises most and lowers most: W_U applied to it, without the last norm.

    None where the site writes to another space than the residual stream, or the model has no unembedding.
    """
    module = _unembedding(lm.model)
    if module is None or site.stream not in _RESIDUAL:
        return None
    up, down = [], []
    zero = module(torch.zeros(1, 1, rows.shape[1], device=lm.device, dtype=lm.dtype)).float()
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        logits = (module(part[None].to(lm.device, lm.dtype)).float() - zero)[0]
        logits[(part.norm(dim=-1) == 0).to(logits.device)] = -torch.inf
        up += _largest(logits, n)
        down += [[(token, -value) for token, value in row] for row in _largest(-logits, n)]
    return up, down


def _unembedding(model: nn.Module) -> nn.Module | None:
    base: Any = root(model)
    found = base.unembed if is_hooked(base) else base.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def _largest(values: Float[Tensor, "k n"], n: int) -> list[list[Weighed]]:
    top = values.topk(min(n, values.shape[1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(i, v) for i, v in zip(*row, strict=True) if abs(v) != float("inf")] for row in pairs]
