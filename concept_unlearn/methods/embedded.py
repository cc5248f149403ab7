"""What a client who writes embeddings may look at beforehand: those of texts it knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations import stream
from ..lm import LM
from ..lm.oracle import EMBEDDING


def embedded(lm: LM, texts: Sequence[Sequence[int]]) -> Float[Tensor, "tokens d"]:
    """Of every token of the texts, given as ids, but BOS and what every chat begins with. On the CPU."""
    rows = stream(lm, [EMBEDDING], [list(ids) for ids in texts], skip=lm.chat_head)
    return torch.cat([r.activations[EMBEDDING].float().cpu() for r in rows])


def root_mean_square(x: Float[Tensor, "tokens d"]) -> float:
    """Of an entry."""
    return float(x.double().square().mean().sqrt())


def principal(groups: Sequence[Float[Tensor, "tokens d"]], rank: int) -> Float[Tensor, "rank d"]:
    """Orthonormal directions that hold most of the squares of all groups, each counting alike."""
    evened = torch.cat([x / x.norm().clamp(min=1e-12) for x in groups]).double()
    found: Tensor = torch.linalg.svd(evened, full_matrices=False).Vh[:rank]
    return found.float()
