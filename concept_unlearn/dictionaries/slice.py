"""The few columns of a dictionary that an edit needs: O(k d) a token instead of O(n_features d).

An edit changes x to x' = x + s(x) sum_i (t_i - a_i) W_dec[i] over the k chosen features; the dictionary's
error term cancels because its decoder is affine. So a slice carries k encoder columns, biases and thresholds,
and k decoder rows, works without its dictionary and is what a patch saves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..lm import Site

Activation = Literal["relu", "jumprelu", "gated", "linear"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]


class Encoded(NamedTuple):
    acts: Float[Tensor, "*batch k"]
    scale: Float[Tensor, "*batch 1"] | None
    """s(x), by which the dictionary multiplies what it decodes; None for 1."""


class Slice(Protocol):
    """The chosen features of a dictionary: what an edit reads at ``site`` and adds at ``site_out``."""

    @property
    def site(self) -> Site: ...

    @property
    def site_out(self) -> Site: ...

    @property
    def features(self) -> tuple[int, ...]: ...

    @property
    def W_dec(self) -> Float[Tensor, "k d_out"]: ...  # noqa: N802

    @property
    def max_norm(self) -> float: ...

    @property
    def d_in(self) -> int: ...

    def encode(self, x: Float[Tensor, "*batch d"]) -> Encoded: ...

    def to(self, device: torch.device) -> Slice: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def spec(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ColumnSlice:
    """k encoder columns, for dictionaries in which a feature depends on its own column alone.

    Computes in float32 whatever the model computes in. ``activation="linear"`` serves directions, which are
    dictionaries of one feature: ablating a difference of means or LEACE is setting it to zero.
    """

    site: Site
    site_out: Site
    features: tuple[int, ...]
    W_enc: Float[Tensor, "d k"]
    b_enc: Float[Tensor, " k"]
    W_dec: Float[Tensor, "k d_out"]
    activation: Activation = "relu"
    threshold: Float[Tensor, " k"] | None = None
    """Of a JumpReLU."""
    gate_scale: Float[Tensor, " k"] | None = None
    """exp(r_mag) of a gated SAE, whose b_enc is b_gate."""
    b_mag: Float[Tensor, " k"] | None = None
    normalisation: Normalisation = "none"
    decode_scale: bool = True
    """False for transcoders, which normalise what they read and not what they write."""
    max_norm: float = float("inf")
    """Tokens with a larger norm at the site are sinks the dictionary never saw: they are left alone."""

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    def encode(self, x: Float[Tensor, "*batch d"]) -> Encoded:
        x = x.float()
        z, scale = self._normalise(x)
        pre = z @ self.W_enc + self.b_enc
        return Encoded(self._activate(pre), scale if self.decode_scale else None)

    def to(self, device: torch.device) -> ColumnSlice:
        if self.W_enc.device == device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def spec(self) -> dict[str, Any]:
        """What ``tensors`` leaves out, as plain data."""
        return {
            "kind": "columns",
            "site": str(self.site),
            "site_out": str(self.site_out),
            "features": list(self.features),
            "activation": self.activation,
            "normalisation": self.normalisation,
            "decode_scale": self.decode_scale,
            "max_norm": self.max_norm if self.max_norm != float("inf") else None,
        }

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> ColumnSlice:
        return cls(
            site=Site.parse(spec["site"]),
            site_out=Site.parse(spec["site_out"]),
            features=tuple(spec["features"]),
            activation=spec["activation"],
            normalisation=spec["normalisation"],
            decode_scale=spec["decode_scale"],
            max_norm=float("inf") if spec["max_norm"] is None else spec["max_norm"],
            **tensors,
        )

    def _normalise(self, x: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor | None]:
        match self.normalisation:
            case "none":
                return x, None
            case "layer_norm":
                x = x - x.mean(-1, keepdim=True)
                std = x.std(-1, keepdim=True)
                return x / (std + 1e-5), std
            case "constant_norm_rescale":
                scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
                return x / scale, scale
        raise AssertionError(self.normalisation)

    def _activate(self, pre: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        match self.activation:
            case "linear":
                return pre
            case "relu":
                return pre.relu()
            case "jumprelu":
                assert self.threshold is not None
                return pre.relu() * (pre > self.threshold)
            case "gated":
                assert self.gate_scale is not None
                assert self.b_mag is not None
                magnitude = (pre - self.b_enc) * self.gate_scale + self.b_mag
                return magnitude.relu() * (pre > 0)
        raise AssertionError(self.activation)


def direction(
    site: Site,
    read: Float[Tensor, " d"],
    write: Float[Tensor, " d"],
    *,
    bias: float = 0.0,
    normalisation: Normalisation = "none",
    max_norm: float = float("inf"),
) -> ColumnSlice:
    """One linear feature: its activation is ``read . x + bias``, and a unit of it is ``write``."""
    return ColumnSlice(
        site=site,
        site_out=site,
        features=(0,),
        W_enc=read.float()[:, None].contiguous(),
        b_enc=torch.tensor([bias], dtype=torch.float32, device=read.device),
        W_dec=write.float()[None].contiguous(),
        activation="linear",
        normalisation=normalisation,
        max_norm=max_norm,
    )
