"""What every method shares that goes down objectives, whatever the parameters are that it trains."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from ..data.scope import Scope
from ..errors import NonFinite
from ..journal import Journal
from ..lm.fingerprint import checksum, fingerprint
from ..objectives import Objective
from ..training import Log, Loop, Optimisation, Probe
from ..training.data import make_data
from ..training.references import look_up
from ..training.trainable import Trainable, autocast, checkpointed
from ..weights import Delta
from .base import Method, Study

_CHANGES_NOTHING = ("checkpoint_every", "micro_batch", "gradient_checkpointing", "store")


class _Descent(Method, Optimisation):
    """Go down a weighted sum of objectives. With a study's folder training goes on from its last checkpoint."""

    objectives: tuple[Objective, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _objectives_fit_together(self) -> Self:
        if any(o in self.objectives[:i] for i, o in enumerate(self.objectives)):
            raise ValueError("two objectives are equal: give one of them twice the weight instead")
        if self.balance and not any(o.retains for o in self.objectives):
            raise ValueError("a balance needs an objective that retains, such as retain_nll")
        return self

    @abstractmethod
    def _trainable(self, study: Study) -> AbstractContextManager[Trainable]:
        """What is trained, in the model inside the block; the model is bit for bit as it was after it."""

    def train(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> dict[str, Delta]:
        """What training has changed of the trainable's parameters, by their names.

        Raises NonFinite for changes that are none, Diverged for training that ran away.
        """
        lm = study.lm
        reads = tuple(dict.fromkeys(r for o in self.objectives for r in o.reads(lm)))
        data = make_data(lm, study.scope, [r.split for r in reads], self, progress=study.progress)
        journal, model = None, fingerprint(lm.model)
        if study.folder is not None:
            rows = {name: [split.rows, split.by_epoch] for name, split in data.splits.items()}
            spec = {name: value for name, value in self.spec().items() if name not in _CHANGES_NOTHING}
            what = {
                "model": model,
                "weights": checksum(lm.model),
                "dtype": str(lm.dtype),
                "method": spec,
                "rows": _digest(rows),
            }
            journal = Journal(study.folder, what, name="finetuning")
            journal.claim()
        precision = autocast(lm, self.precision)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            trainable = stack.enter_context(self._trainable(study))
            stack.enter_context(checkpointed(trainable.lm, self.gradient_checkpointing))
            head = trainable.head()
            live = trainable.reference(head)
            with precision():
                reference = look_up(
                    live, data.splits, reads, model=model, folder=study.folder, batch_size=2 * self.micro_batch
                )
            loop = Loop(
                trainable.lm, self.objectives, data, self, trainable, head=head, reference=reference,
                autocast=precision, journal=journal, log=log, probe=probe, progress=study.progress,
            )  # fmt: skip
            deltas = loop.run()
        if not deltas:
            warnings.warn("training changed nothing: no objective has a gradient here", stacklevel=3)
        for name, delta in deltas.items():
            if not all(t.isfinite().all() for t in delta.tensors().values() if t.is_floating_point()):
                raise NonFinite(f"training ended in NaN or infinite weights ({name}): try a lower learning rate")
        return deltas

    def n_items(self, scope: Scope) -> int:
        """How much its progress adds up to: forget items (retained ones where nothing is forgotten)."""
        n = len(scope.forget)
        return round(self.epochs * n) if self.max_steps is None else self.max_steps * min(self.batch_size, n)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
