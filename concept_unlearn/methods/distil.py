"""Bake any patch into the weights: another model learns to say what the patched one says."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ..data.scope import Scope
from ..errors import InvalidConfig
from ..lm import LM, Site
from ..objectives import Follow, Objective, RetainKL
from ..patches import Patch, WeightPatch
from ..patches.base import parts
from ..training import Log, Optimisation, Probe
from ..training.difference import Difference, difference
from ..training.rows import order
from .base import Method, Study
from .finetune import Finetune

_MISSED = 0.5
"""Share of the teacher's effect above which what the student misses is warned of."""


class Distilled(NamedTuple):
    """On one side, between teacher and student, and as far as the untouched model is from the teacher."""

    student: Difference
    untouched: Difference

    @property
    def missed(self) -> float:
        """Share of the teacher's effect that the student has not; 0 where there was none to have."""
        return self.student.kl / self.untouched.kl if self.untouched.kl > 0 else 0.0


class Distil(Method, Optimisation):
    """``teacher`` makes a patch; the model's weights follow the model under that patch, to forget and to keep as it.

    What is left is a weight patch, without hook or gate, which can be baked into a checkpoint. A gate that reads the
    prompt takes a row of training, answer and all, for one. How well it worked is measured on passages held out of
    training, told to ``log`` at the last step, and warned of where half of the teacher's effect is missed.
    """

    teacher: Method
    objectives: tuple[Objective, ...] = Field((Follow(where="content"), RetainKL(where="content")), min_length=1)
    """Their reference is the teacher."""
    adapter: dict[str, Any] | None = None
    """As of ``finetune``."""
    parameters: tuple[str, ...] | None = None
    """As of ``finetune``."""
    store: Literal["float32", "bfloat16"] = "float32"
    """As of ``finetune``."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the passages to forget and of those to keep that the student is not trained on; with 0 it is measured on
    what it was trained on.
    """

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> WeightPatch:
        teacher = self.teacher.fit(_part(study, "teacher", study.scope))
        if any(p.access == "logits" for p in parts(teacher)):
            raise InvalidConfig(
                f"a student follows what a patch does inside the model, and a {teacher.kind} patch changes the logits "
                "that come out of it"
            )
        taught, held = _halves(study.scope, self.held_out, self.seed)
        last = [0]

        def hear(step: int, values: Any) -> None:
            last[0] = step
            if log:
                log(step, values)

        student = self._student().fit(_part(study, "student", taught), log=hear, probe=probe, teacher=teacher)
        measured = {
            side: self.measure(study.lm, teacher, student, held, side) for side in ("forget", "retain")
        }  # fmt: skip
        if log:
            log(last[0], {f"{side}_{name}": x for side, found in measured.items() for name, x in _told(found).items()})
        for side, found in measured.items():
            if found.missed > _MISSED and found.student.kl > 1e-3:
                warnings.warn(
                    f"on held-out text to {side} the student is {found.student.kl:.3g} nats a token from its teacher, "
                    f"and the untouched model {found.untouched.kl:.3g}: train longer, or with a higher learning rate",
                    stacklevel=2,
                )
        return student

    def measure(self, lm: LM, teacher: Patch, student: Patch, scope: Scope, side: str) -> Distilled:
        passages = scope.forget if side == "forget" else (*scope.near, *scope.retain)
        size = {"batch_size": self.micro_batch, "max_length": self.max_length}
        return Distilled(*(difference(lm, teacher, p, passages, **size) for p in (student, None)))

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        return self.teacher.reads

    def _student(self) -> Finetune:
        own = set(Optimisation.model_fields) | {"objectives", "adapter", "parameters", "store"}
        return Finetune(**{name: getattr(self, name) for name in own})


def _told(found: Distilled) -> dict[str, float]:
    return {"kl": found.student.kl, "same": found.student.same, "untouched_kl": found.untouched.kl}


def _part(study: Study, name: str, scope: Scope) -> Study:
    """The same study for a part of the work: its measurements are shared, its folder is its own."""
    part = copy.copy(study)
    part.scope = scope
    part.folder = None if study.folder is None else study.folder / name
    return part


def _halves(scope: Scope, share: float, seed: int) -> tuple[Scope, Scope]:
    """What is trained on and what is held out of it; all of it twice where nothing is held out."""
    if share == 0:
        return scope, scope
    kept, held = dict[str, Any](), dict[str, Any]()
    for name in ("forget", "near", "retain"):
        passages = getattr(scope, name)
        n = min(max(round(share * len(passages)), 1), len(passages) - 1)
        chosen = set(order(len(passages), seed=seed, epoch=-2)[:n]) if n > 0 else set()
        kept[name] = tuple(p for i, p in enumerate(passages) if i not in chosen)
        held[name] = tuple(p for i, p in enumerate(passages) if i in chosen)
    return replace(scope, **kept), replace(scope, **held)
