"""Unlearn by gradients: any objectives, any part of the weights, and what is left is a patch."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from ..data.scope import Scope
from ..errors import InvalidConfig, NonFinite
from ..journal import Journal
from ..lm.fingerprint import checksum, fingerprint
from ..lm.head import Head
from ..objectives import Objective
from ..patches import WeightPatch
from ..training import Log, Loop, Optimisation, Probe
from ..training.adapter import train_adapter
from ..training.data import make_data
from ..training.references import look_up
from ..training.sharded import is_sharded, train_shares
from ..training.trainable import Trainable, autocast, checkpointed, train_weights
from .base import Method, Study

_CHANGES_NOTHING = ("checkpoint_every", "micro_batch", "gradient_checkpointing", "store")


class Finetune(Method, Optimisation):
    """Go down a weighted sum of objectives from the model as it is, and put it back bit for bit.

    The patch holds what changed. With a ``folder`` training goes on from its last checkpoint, to the same weights.
    """

    objectives: tuple[Objective, ...] = Field(min_length=1)
    adapter: dict[str, Any] | None = None
    """PEFT's own settings, e.g. {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}; ``peft_type`` is LORA
    where not given. None trains the model's own weights.
    """
    parameters: tuple[str, ...] | None = None
    """Patterns of the names of parameters to train, e.g. "model.layers.[4-7].mlp.*". None trains what the objectives
    are meant for: everything, but for RMU.
    """
    store: Literal["float32", "bfloat16"] = "float32"
    """How the patch holds its change; bfloat16 takes half the space and rounds the change, not the weight."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if any(o in self.objectives[:i] for i, o in enumerate(self.objectives)):
            raise ValueError("two objectives are equal: give one of them twice the weight instead")
        if self.balance and not any(o.retains for o in self.objectives):
            raise ValueError("a balance needs an objective that retains, such as retain_nll")
        return self

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> WeightPatch:
        """``log(step, values)`` hears of every step's losses; ``probe(step)`` may look at the model as it is then."""
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
            head = Head(trainable.lm.model)
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
            warnings.warn("training changed nothing: no objective has a gradient here", stacklevel=2)
        patch = WeightPatch(deltas)
        if not all(t.isfinite().all() for t in patch.tensors().values() if t.is_floating_point()):
            raise NonFinite("training ended in NaN or infinite weights: try a lower learning rate")
        return patch.to(getattr(torch, self.store))

    def n_items(self, scope: Scope) -> int:
        """How much its progress adds up to: forget items (retained ones where nothing is forgotten)."""
        n = len(scope.forget)
        return round(self.epochs * n) if self.max_steps is None else self.max_steps * min(self.batch_size, n)

    def _trainable(self, study: Study) -> AbstractContextManager[Trainable]:
        if self.adapter is not None:
            if self.parameters is not None:
                raise InvalidConfig("an adapter has parameters of its own: give target_modules there, not parameters")
            if is_sharded():
                raise InvalidConfig(
                    "an adapter is not sharded: launch without FSDP; gradient_checkpointing saves memory"
                )
            return train_adapter(study.lm, self.adapter, seed=self.seed)
        meant = [o.trains(study.lm) for o in self.objectives if not o.retains]
        named = tuple(dict.fromkeys(name for names in meant for name in names or ()))
        chosen = self.parameters or (named if named and None not in meant else None)
        return train_shares(study.lm, chosen) if is_sharded() else train_weights(study.lm, chosen)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
