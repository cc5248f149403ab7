"""What is done to the chosen features. Any edit works with any gate, dictionary and site.

An edit maps the activations a of the k chosen features to targets t; the patch then adds
sum_i (t_i - a_i) W_dec[i] to the residual. Where t equals a nothing changes, bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from .component import Component, Frozen
from .errors import InvalidConfig


class Relative(Frozen):
    """``Relative(-0.5)``: each of the k features is worth -0.5 ||x|| / k in the residual, x being the token.

    Absolute values do not travel: -500 is strong on a residual of norm 92 and nothing on one of 30,000.
    """

    of_norm: float

    def __init__(self, of_norm: float) -> None:
        super().__init__(of_norm=of_norm)  # type: ignore[call-arg]


Value = float | Relative


class Edit(Component, family=True):
    """activations of the k chosen features -> their targets"""

    @abstractmethod
    def __call__(self, acts: Float[Tensor, "*batch k"], unit: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """``unit`` is the activation at which a feature adds ||x|| / k to the residual."""

    def fitted(self, retain_mean: Float[Tensor, " k"]) -> Edit:
        """The edit with what it needs to know of the retain corpus filled in; most need nothing."""
        return self


class Zero(Edit):
    """Ablate: t = 0. Known to be weak; the other features carry the concept on."""

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return torch.zeros_like(acts)


class Scale(Edit):
    """Multiply where active: t = by * a. ``by=-6`` is the "negative multiple" of the literature."""

    by: float

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return acts * self.by


class Clamp(Edit):
    """Set to a fixed value where active (Farrell et al. 2024, arXiv 2410.19278): t = to if a > above else a."""

    to: Value = -20.0
    """Usually negative; a number, or ``{of_norm: -0.5}``."""
    above: float = 0.0

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return torch.where(acts > self.above, _target(self.to, acts, unit), acts)


class DenseClamp(Edit):
    """Set on every token that the gate lets through, active or not (arXiv 2504.08192): t = to."""

    to: Value = -20.0

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return _target(self.to, acts, unit)


class Shift(Edit):
    """Add a fixed amount on every token that the gate lets through: t = a + by. Steering, with a direction."""

    by: Value

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return acts + _target(self.by, acts, unit)


class Mean(Edit):
    """Replace by the feature's mean over the retain corpus where active."""

    values: tuple[float, ...] | None = None
    """One a feature; filled in from the statistics where it is not given."""

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        if self.values is None or len(self.values) != acts.shape[-1]:
            given = "none" if self.values is None else len(self.values)
            raise InvalidConfig(f"mean needs one value for each of {acts.shape[-1]} features; given: {given}")
        return torch.where(acts > 0, torch.tensor(self.values, dtype=acts.dtype, device=acts.device), acts)

    def fitted(self, retain_mean: Tensor) -> Mean:
        return self if self.values is not None else Mean(values=tuple(retain_mean.tolist()))


class Refuse(Edit):
    """Raise the last chosen feature, say one of refusal, where any of the others exceeds ``above``."""

    to: Value = Relative(0.5)
    above: float = 0.05
    dense: bool = False
    """Raise it on every token that the gate lets through, whatever fires there."""

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        raised = torch.cat([acts[..., :-1], _target(self.to, acts, unit)[..., -1:]], dim=-1)
        if self.dense:
            return raised
        return torch.where((acts[..., :-1] > self.above).any(-1, keepdim=True), raised, acts)


def _target(to: Value, acts: Tensor, unit: Tensor) -> Tensor:
    return unit * to.of_norm if isinstance(to, Relative) else torch.full_like(acts, to)
