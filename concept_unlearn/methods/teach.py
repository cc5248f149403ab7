"""Teach a model passages, and the same model without those to be forgotten: what unlearning is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.examples import Passage
from ..data.scope import Scope
from ..lm import LM
from ..objectives import GA
from ..patches import WeightPatch
from ..tracking import Progress
from ..training import Optimisation
from .base import Study
from .finetune import Finetune


def teach(
    lm: LM,
    passages: Sequence[Passage],
    *,
    recipe: Optimisation | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:
    """What next-token training on these passages changes. With a ``folder`` it goes on from its last checkpoint."""
    settings = {} if recipe is None else recipe.model_dump(include=set(Optimisation.model_fields))
    method = Finetune(objectives=(GA(weight=-1.0),), **settings)  # ascent backwards is plain training
    scope = Scope(name="taught", forget=tuple(passages), retain=(Passage(text="nothing"),))
    return method.fit(Study(lm, scope, folder=None if folder is None else Path(folder), progress=progress))


def retrain(
    lm: LM,
    scope: Scope,
    *,
    recipe: Optimisation | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:
    """The reference that never saw what is to be forgotten: ``lm``, the model before it was taught anything of the
    scope, taught all that is kept by the recipe that taught it everything.
    """
    return teach(lm, (*scope.retain, *scope.near), recipe=recipe, folder=folder, progress=progress)
