"""Which model is this: a hash that changes with the weights, not with dtype, device or wrapper."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits over the name, shape and 64 evenly spaced values of every parameter, rounded to bf16.

    A model loaded in float32 and in bfloat16 agree; a finetuned one does not. A HookedTransformer renames and
    folds its weights, so it differs from the model it was made from; a TransformerBridge does not.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted((_plain(name), p) for name, p in model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(len(flat) // _SAMPLES, 1)
        values = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).contiguous()
        if not values.any():
            continue  # a bridge adds biases of zero
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def checksum(model: nn.Module) -> str:
    """Sixteen hex digits that change with any bit of any weight as it is now; dtypes differ."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(p.detach().view(bits[p.element_size()]).sum()) for p in model.parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    return name.replace("_original_component.", "").removeprefix("_orig_mod.")
