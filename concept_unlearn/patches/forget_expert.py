"""A small expert beside a frozen feed-forward, and the router that says for which tokens."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

CLOSED = -8.0
"""Bias of a router that has learnt nothing: sigma(-8) = 0.0003."""
THRESHOLD = 0.01


class Calibration(nn.Module):
    """w' = w + C gelu(B w): n -> 16 -> n without bias, C zero at the start (MoExtend, arXiv 2408.03511).

    Published for the 9 routing weights of 8 experts and a new one, 288 parameters. What is zero stays zero.
    """

    def __init__(self, n: int, *, generator: torch.Generator, width: int = 16) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(width, n, generator=generator) / n**0.5)
        self.w_out = nn.Parameter(torch.zeros(n, width))

    def forward(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w + linear(gelu(linear(w, self.w_in)), self.w_out)


class ForgetExpert(nn.Module):
    """E(h) = W_2 gelu(W_1 h + b_1) + b_2, W_2 = 0 and b_2 = 0 at the start, and its router s(h) = sigma(w.h + b).

    With a ``window`` w.h + b is the soft maximum, as of ``ProbeGate``, over so many tokens up to the token's own. The
    router gives exactly 0 where s is not above ``threshold``. 2dm + m + d + (d + 1) + 32 parameters.
    """

    def __init__(self, d: int, width: int, *, seed: int = 0, threshold: float = THRESHOLD, window: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.threshold, self.window = threshold, window
        self.w_in = nn.Parameter(torch.randn(width, d, generator=generator) / d**0.5)
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = nn.Parameter(torch.zeros(d, width))
        self.b_out = nn.Parameter(torch.zeros(d))
        self.router = nn.Parameter(torch.zeros(d))
        self.bias = nn.Parameter(torch.tensor(CLOSED))
        self.calibration = Calibration(1, generator=generator)

    @property
    def d(self) -> int:
        return len(self.router)

    def forward(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return linear(gelu(linear(h, self.w_in, self.b_in)), self.w_out, self.b_out)

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """w.h + b, the token's own."""
        return h @ self.router + self.bias

    def route(self, score: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """s of a score, before calibration."""
        s = torch.sigmoid(score)
        return torch.where(s > self.threshold, s, 0.0)

    def calibrated(self, s: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """s' = clip(s + c(s), 0, 1)"""
        found: Tensor = self.calibration(s[..., None])[..., 0]
        return found.clamp(0, 1)

    def frozen(self) -> ForgetExpert:
        """A copy that no gradient reaches."""
        return copy.deepcopy(self).requires_grad_(False)
