"""Unlearn for a model that can only be asked: train a small one, and add what it learned to what the big one says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field

from ..errors import InvalidConfig
from ..lm import LM, Site
from ..lm.ensemble import common_vocabulary
from ..lm.fingerprint import checksum
from ..lm.head import ending
from ..objectives import GA, Objective, RetainKL
from ..patches.logit import LogitPatch, Small
from ..training import Log, Probe
from ..training.adapter import train_adapter
from ..training.ensemble import Pair
from ..training.sharded import is_sharded
from ..training.trainable import Trainable, checkpointed, flags_restored, train_weights
from .base import Study
from .descent import _Descent


class Offset(_Descent):
    """Go down objectives of l_e = l_M + alpha (l_o' - l_o), by the small model o' alone (arXiv 2404.11045).

    The big model M is never trained and needs only say its logits; p_M is the reference. Objectives that read
    activations have no meaning here. Defaults are those of the paper's KL-min recipe as others have rebuilt it.
    """

    small: str
    """The small model o, of the same tokenizer: a folder, an embedded name or a Hub id."""
    alpha: float = Field(1.0, gt=0, lt=float("inf"))
    objectives: tuple[Objective, ...] = Field((GA(), RetainKL()), min_length=1)
    adapter: dict[str, Any] | None = None
    """PEFT's own settings, as of Finetune: o' is o with an adapter. None trains o's own weights."""
    parameters: tuple[str, ...] | None = None
    """Patterns of the names of o's parameters to train; None trains them all."""
    store: Literal["float32", "bfloat16"] = "float32"
    """How the patch holds the change of o."""
    batch_size: int = Field(16, gt=0)
    """Forget items an optimiser step."""
    micro_batch: int = Field(4, gt=0)
    """Rows that go through the models at a time; changes memory and speed, never a result."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> LogitPatch:
        """``log(step, values)`` hears of every step's losses."""
        deltas, small = self.train(study, log=log, probe=probe), self._small(study)
        beside = Small(self.small, small.fingerprint, small)
        return LogitPatch(deltas, beside, alpha=self.alpha).to(getattr(torch, self.store))

    @contextmanager
    def _trainable(self, study: Study) -> Iterator[Trainable]:
        lm, small = study.lm, self._small(study)
        n = self._check(study, small)
        inner = (
            train_weights(small, self.parameters)
            if self.adapter is None
            else train_adapter(small, self.adapter, seed=self.seed)
        )
        with inner as trained, checkpointed(small, self.gradient_checkpointing), flags_restored(lm.model):
            yield Pair(lm, ending(lm.model), trained, alpha=self.alpha, n=n)

    def _check(self, study: Study, small: LM) -> int:
        """How many tokens both models know."""
        if is_sharded():
            raise InvalidConfig("an offset is trained by a model that fits on one device: launch without FSDP")
        if self.adapter is not None and self.parameters is not None:
            raise InvalidConfig("an adapter has parameters of its own: give target_modules there, not parameters")
        for objective in self.objectives:
            if sites := [str(r.what) for r in objective.reads(study.lm) if isinstance(r.what, Site)]:
                raise InvalidConfig(
                    f"{objective.kind} reads activations ({sites[0]}), and an offset changes only what a model says: "
                    "take objectives of answers, such as npo and retain_kl"
                )
        return common_vocabulary(study.lm, small)

    def _small(self, study: Study) -> LM:
        return study.once(("small", self.small), lambda: LM.load(self.small, device=study.lm.device))

    def _begins_with(self, study: Study) -> dict[str, str]:
        return {"small": checksum(self._small(study).model)}
