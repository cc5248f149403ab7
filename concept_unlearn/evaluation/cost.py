"""What a patch costs: at inference, measured beside the model without it, and to make."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from ..component import Frozen
from ..data.encode import pad
from ..lm import LM
from ..lm.forward import forward
from ..patches import Patch

_PAIRS = 5


class Cost(Frozen):
    """What is None was not measured."""

    n_bytes: int
    n_parameters: int
    latency: float
    """Time of a forward pass with the patch over one without: median of paired ratios."""
    fit_seconds: float | None = None
    """Of making the patch, as are all that follow: by the clock."""
    fit_cpu_seconds: float | None = None
    peak_mb: float | None = None
    """Most memory above what was in use before, in MiB."""
    forward_tokens: int | None = None
    """Passed through the model."""
    backward_tokens: int | None = None
    """Passed back through it."""
    access: str | None = None
    """What the method needs of the model."""


@torch.no_grad()
def measure_cost(lm: LM, patch: Patch, texts: Sequence[Sequence[int]]) -> Cost:
    """One batch of ``texts``, timed in turn with the patch on and off."""
    ids, mask = pad(texts, side="right", device=lm.device)

    def seconds() -> float:
        start = time.perf_counter()
        forward(lm.model, ids, mask, keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()
    ratios = []
    for _ in range(_PAIRS):
        without = seconds()
        with patch.on(lm):
            ratios.append(seconds() / without)
    n_parameters = sum(t.numel() for t in patch.tensors().values())
    return Cost(n_bytes=patch.n_bytes, n_parameters=n_parameters, latency=statistics.median(ratios))
