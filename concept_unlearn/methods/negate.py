"""Learn what is to be forgotten, then go as far the other way (task vectors, arXiv 2212.04089)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..objectives import GA
from ..patches import WeightPatch
from ..training import Optimisation
from .base import Method, Study
from .finetune import Finetune


class Negate(Method, Optimisation):
    """theta - scale * (theta_taught - theta), theta_taught trained to predict the passages to forget."""

    scale: float = Field(1.0, ge=0)
    """Lambda: how far the other way; calibration lowers it by the strength of the patch."""
    adapter: dict[str, Any] | None = None
    """As ``Finetune`` takes them, as are ``parameters`` and ``store``."""
    parameters: tuple[str, ...] | None = None
    store: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _learns_from_what_is_to_be_forgotten_alone(self) -> Self:
        if self.watch or self.balance:
            raise ValueError("what is negated is learned to the end: there is nothing to watch or to balance")
        return self

    def fit(self, study: Study) -> WeightPatch:
        taught = self.lesson.fit(study)
        return WeightPatch({n: d.scaled(-self.scale) for n, d in taught.deltas.items()} if self.scale else {})

    @property
    def lesson(self) -> Finetune:
        """What teaches."""
        settings = self.model_dump(include={*Optimisation.model_fields, "adapter", "parameters", "store"})
        return Finetune(objectives=(GA(weight=-1.0),), **settings)  # ascent backwards is plain training
