"""What every method shares that goes down objectives, whatever the parameters are that it trains."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from ..data.scope import Scope
from ..errors import InvalidConfig, NonFinite
from ..journal import Journal
from ..lm import Site
from ..lm.fingerprint import checksum, fingerprint
from ..lm.labels import Labels, first_tokens
from ..objectives import Objective
from ..patches import Patch
from ..training import Log, Loop, Optimisation, Probe
from ..training.attribution import Attribution
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

    @property
    def _labels(self) -> Mapping[str, Sequence[str]]:
        """Of classification: what may be said, and the words that say it."""
        return {}

    @property
    def _also_read(self) -> tuple[str, ...]:
        """Splits besides those of the objectives."""
        return ()

    def _begins_with(self, study: Study) -> dict[str, str]:
        """What else than the model training begins with: a checkpoint of another is not gone on from."""
        return {}

    def _prepare(self, attribution: Attribution, study: Study) -> None:
        """Called before the first step, while the trainable is as it was."""

    def train(
        self, study: Study, *, log: Log | None = None, probe: Probe | None = None, teacher: Patch | None = None
    ) -> dict[str, Delta]:
        """What training has changed of the trainable's parameters, by their names.

        The reference is the untouched model (the study's ``original``), with the ``teacher`` on where there is one.
        Raises NonFinite for changes that are none, Diverged for training that ran away.
        """
        lm = study.lm
        reads = tuple(dict.fromkeys(r for o in self.objectives for r in o.reads(lm)))
        splits = [*(r.split for r in reads), *self._also_read]
        if self._labels and (odd := [r for r in reads if r.where != "answer" or isinstance(r.what, Site)]):
            raise InvalidConfig(f"a label is an answer's, and an objective reads {odd[0].what} at {odd[0].where}")
        label_ids = first_tokens(lm.tokenizer, self._labels)
        data = make_data(lm, study.scope, splits, self, labels=tuple(self._labels), progress=study.progress)
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
                **self._begins_with(study),
            }
            if teacher is not None:
                what["teacher"] = teacher.digest
            elif study.original is not None:
                with study.original():
                    what["reference"] = checksum(lm.model)
            journal = Journal(study.folder, what, name="finetuning")
            journal.claim()
        precision = autocast(lm, self.precision)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            trainable = stack.enter_context(self._trainable(study))
            if trainable.sharded and study.original is not None:
                raise InvalidConfig("the original model is no reference under FSDP: launch without it")
            stack.enter_context(checkpointed(trainable.lm, self.gradient_checkpointing))
            head = trainable.head()
            if self._labels:
                head = Labels(head, label_ids)
            live = trainable.reference(head)
            with precision(), trainable.untouched(), ExitStack() as on:
                also = study.original if teacher is None else partial(teacher.on, live.lm)
                if also is not None:
                    live = live.within(also)
                    on.enter_context(also())
                reference = look_up(
                    live, data.splits, reads, model=model, patch="" if teacher is None else teacher.digest,
                    folder=study.folder, batch_size=2 * self.micro_batch,
                )  # fmt: skip
            self._prepare(Attribution(trainable, data, head, precision, self.micro_batch), study)
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
        n, turns = len(scope.forget), 2 if self.alternate else 1
        return round(turns * self.epochs * n) if self.max_steps is None else self.max_steps * min(self.batch_size, n)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
