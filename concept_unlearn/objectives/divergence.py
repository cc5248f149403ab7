"""How far what the model says of a token is from what the reference says."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def divergence(z: Float[Tensor, "n vocab"], z0: Float[Tensor, "n vocab"], _: object = None) -> Float[Tensor, " n"]:
    """KL(p^0 || p) in nats, of the logits of the model and of the reference; the tokens that came do not matter."""
    return F.kl_div(z.log_softmax(-1), z0.log_softmax(-1), reduction="none", log_target=True).sum(-1)
