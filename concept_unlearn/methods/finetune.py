"""Unlearn by gradients: any objectives, any part of the weights, and what is left is a patch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from ..data.scope import Scope
from ..errors import InvalidConfig
from ..lm import LM
from ..patches import Patch, WeightPatch
from ..tracking import Progress
from ..training import Log, Probe
from ..training.adapter import train_adapter
from ..training.attribution import Attribution, Mask
from ..training.data import make_data
from ..training.sharded import is_sharded, train_shares
from ..training.trainable import HALF, Trainable, autocast, checkpointed, train_weights
from .base import Study
from .descent import _Descent


class Finetune(_Descent):
    """Go down a weighted sum of objectives from the model as it is, and put it back bit for bit.

    The patch holds what changed. With a ``folder`` training goes on from its last checkpoint, to the same weights.
    """

    adapter: dict[str, Any] | None = None
    """PEFT's own settings, e.g. {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}; ``peft_type`` is LORA
    where not given. None trains the model's own weights.
    """
    parameters: tuple[str, ...] | None = None
    """Patterns of the names of parameters to train, e.g. "model.layers.[4-7].mlp.*". None trains what the objectives
    are meant for: everything, but for RMU.
    """
    mask: Mask | None = None
    """Train only the weights that have most to do with what is to be forgotten, e.g. {score: wagle, ratio: 0.8}."""
    store: Literal["float32", "bfloat16"] = "float32"
    """How the patch holds its change; bfloat16 takes half the space and rounds the change, not the weight."""

    def fit(
        self, study: Study, *, log: Log | None = None, probe: Probe | None = None, teacher: Patch | None = None
    ) -> WeightPatch:
        """``log(step, values)`` hears of every step's losses; ``probe(step)`` may look at the model as it is then."""
        return WeightPatch(self.train(study, log=log, probe=probe, teacher=teacher)).to(getattr(torch, self.store))

    def selected(self, lm: LM, scope: Scope, *, progress: Progress | None = None) -> dict[str, Bool[Tensor, "*shape"]]:
        """The weights that ``mask`` lets be trained, by parameter: ``weights.shares`` says in which blocks they are.

        Raises InvalidConfig without a mask, and as ``fit`` does.
        """
        if self.mask is None:
            raise InvalidConfig("there is no mask to ask for: every weight is trained")
        data = make_data(lm, scope, self.mask.splits, self, progress=progress)
        precision = autocast(lm, self.precision)  # of the dtype that the model came in
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._trainable(Study(lm, scope)) as trainable,
            checkpointed(trainable.lm, self.gradient_checkpointing),
        ):
            return Attribution(trainable, data, trainable.head(), precision, self.micro_batch).choose(self.mask)

    @property
    def _also_read(self) -> tuple[str, ...]:
        return () if self.mask is None else self.mask.splits

    def _prepare(self, attribution: Attribution, study: Study) -> None:
        if self.mask is not None and self.mask.ratio < 1:
            attribution.trainable.masks = attribution.choose(self.mask, folder=study.folder)

    def _trainable(self, study: Study) -> AbstractContextManager[Trainable]:
        if self.mask is not None and is_sharded():
            raise InvalidConfig("a mask is made of whole gradients: launch without FSDP, or leave the mask out")
        if self.adapter is not None:
            if self.mask is not None:
                raise InvalidConfig("an adapter adds to whole matrices, so it takes no mask: leave one of them out")
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
        if chosen and self.precision == "fp32" and study.lm.dtype in HALF:
            raise InvalidConfig(
                f"a part of a model in {study.lm.dtype} cannot be trained in fp32 beside the rest: load the model in "
                "float32, or leave precision at auto"
            )
        return train_shares(study.lm, chosen) if is_sharded() else train_weights(study.lm, chosen)
