"""How far one item would move the model: the size of the gradient of its mean NLL (arXiv 2402.17012)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.encode import pad
from ..lm import LM
from ..lm.forward import forward
from ..training.trainable import flags_restored


def gradnorm(lm: LM, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, float] | None:
    """``mean`` over parameter tensors of the gradient's 2-norm, and ``global`` of the whole; None without a gradient.

    The model's gradients, flags and modes are what they were.
    """
    if not answer:
        return None
    parameters = list(dict.fromkeys(p for p in lm.model.parameters() if p.is_floating_point()))
    with flags_restored(lm.model), torch.inference_mode(False), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        ids, mask = pad([[*prompt, *answer]], side="right", device=lm.device)
        logits = forward(lm.model, ids, mask, keep=len(answer) + 1).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, -len(answer) :])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = torch.stack([g.detach().float().norm() for g in found if g is not None])
    return {"mean": float(norms.mean()), "global": float(norms.norm())}
