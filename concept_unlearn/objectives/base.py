"""An objective: a differentiable number to go down, a pure function of a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..component import Component
from ..errors import InvalidData
from ..lm import LM
from ..step import Read, Step


class Objective(Component, family=True):
    """Reads the step, changes nothing. Goes into the loss times its weight."""

    weight: float = 1.0
    """gamma of a forgetting term, alpha of a retaining one."""

    retains: ClassVar[bool] = False
    """True for a term that keeps what is to be kept; a balance acts on these."""
    counts: ClassVar[bool] = False
    """True if it asks ``step.agree``, which takes a pass of its own where a step has several parts."""

    @abstractmethod
    def reads(self, lm: LM) -> Sequence[Read]:
        """All that it asks of a step."""

    @abstractmethod
    def __call__(self, step: Step) -> Float[Tensor, ""]: ...

    def trains(self, lm: LM) -> Sequence[str] | None:
        """The parameters it is meant for, by name; None means all."""
        return None


def check_pairs(step: Step, *splits: str) -> None:
    """Raises InvalidData unless the splits have a sequence for each of the others' to stand beside."""
    rows = {split: len(step.batch(split).ids) for split in splits}
    if len(set(rows.values())) > 1:
        raise InvalidData(f"these splits go together, sequence by sequence, so they are equally many; given: {rows}")
