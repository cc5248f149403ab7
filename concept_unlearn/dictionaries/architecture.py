"""What can be trained: a family of architectures, and what the training loop asks of each."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..component import Component
from ..lm import Site
from .base import Dictionary


class Job(NamedTuple):
    """What the loop tells a new trainee."""

    site: Site
    d_in: int
    n_steps: int
    batch: int
    """Rows a step, over all processes."""
    lr: float
    warm_up_steps: int
    decay_steps: int
    """The last so many steps, in which the learning rate falls linearly: SAELens' to zero, a codebook's to a tenth."""
    seed: int
    device: torch.device
    max_norm: float
    """Rows with a larger norm were left out: sinks."""
    model_name: str
    model_fingerprint: str


class Trainee(Protocol):
    """A dictionary in training. All it does is decided by its job, the rows it is given and its state."""

    def step(self, x: Float[Tensor, "rows d"]) -> dict[str, float]:
        """One update; the losses, by name. Among several processes ``x`` is this one's share of the batch."""

    def state(self) -> dict[str, Tensor]:
        """Everything that ``restore`` needs to go on as if nothing had happened, the generator's state included."""

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def dictionary(self) -> Dictionary:
        """As it is now, for inference; training goes on unchanged."""

    def save(self, folder: Path) -> None:
        """Write what ``load_dictionary`` reads."""


class Architecture(Component, family=True):
    """rows of an activation -> a dictionary in training"""

    @abstractmethod
    def __call__(self, job: Job, sample: Float[Tensor, "rows d"]) -> Trainee:
        """A new trainee. ``sample`` are shuffled rows of the first shard, for scales and initial codes."""
