"""Unlearn by small experts beside the feed-forwards of chosen blocks (after MoExtend, arXiv 2408.03511)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from ..features.routing import Router, Routing, fit_routers
from ..features.shift import feed_forward_shift, most_shifted
from ..lm import Site
from ..objectives import NPO, Objective, RetainKL
from ..patches import ExpertPatch
from ..patches.expert import Experts
from ..patches.forget_expert import ForgetExpert
from ..training import Log, Probe
from ..training.modules import train_modules
from ..training.trainable import Trainable
from .base import Study
from .descent import _Descent

_ROUTER = ("router", "bias")


class Expert(_Descent):
    """First routers are fitted that tell forget tokens from retained ones, then experts go down the objectives.

    No weight of the model changes, and tokens that a router does not let through are computed as ever.
    """

    objectives: tuple[Objective, ...] = Field((NPO(), RetainKL()), min_length=1)
    layers: Literal["shift"] | tuple[int, ...] = "shift"
    """Blocks; ``shift`` takes those whose feed-forward behaves most otherwise on forget text."""
    n_layers: int | None = Field(None, gt=0)
    """How many ``shift`` takes; half of them where not given."""
    width: int = Field(64, gt=0)
    rho: Literal[0, 1] = 0
    """0: an expert adds to the feed-forward; 1: it takes its place."""
    sticky: bool = False
    """Once a token of the prompt is let through, all later ones are; in training every token counts as the prompt."""
    routing: Routing = Routing()
    joint: bool = False
    """Train the routers too, from where they were fitted; their thresholds stay."""
    lr: float = Field(1e-4, gt=0)

    @model_validator(mode="after")
    def _layers_make_sense(self) -> Self:
        if self.layers != "shift":
            if not self.layers or len(set(self.layers)) < len(self.layers):
                raise ValueError(f"layers are different blocks, at least one; given: {list(self.layers)}")
            if self.n_layers is not None:
                raise ValueError("n_layers is for layers: shift; these are given")
        if self.gradient_checkpointing:
            raise ValueError("an expert answers once a pass, so its block cannot be computed again: "
                             "leave gradient_checkpointing off, and take a smaller micro_batch")  # fmt: skip
        return self

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> ExpertPatch:
        """``log`` hears first of each router's recall, then of every step's losses.

        Raises SiteNotFound for a block without a feed-forward, InvalidData where no router can tell.
        """
        routers = self._routers(study)
        if log:
            log(0, {f"router_recall.{layer}": router.recall for layer, router in routers.items()})
        changes, experts = self.train(study, log=log, probe=probe), self._experts(study)
        with torch.no_grad():
            for layer, expert in experts.items():
                for name, p in expert.named_parameters():
                    if (change := changes.get(f"{layer}.{name}")) is not None:
                        p.add_(change.dense())
        return ExpertPatch(experts=experts, rho=self.rho, sticky=self.sticky)

    def _trainable(self, study: Study) -> AbstractContextManager[Trainable]:
        experts = self._experts(study)
        parameters = {
            f"{layer}.{name}": p
            for layer, expert in experts.items()
            for name, p in expert.named_parameters()
            if self.joint or name not in _ROUTER
        }
        edits = Experts(experts, rho=self.rho, sticky=self.sticky).edits()
        return train_modules(study.lm, edits, parameters)

    def _experts(self, study: Study) -> dict[int, ForgetExpert]:
        """As they are when training begins, the same each time; frozen."""
        found = {}
        for layer, router in self._routers(study).items():
            seed = self.seed * study.lm.n_layers + layer
            expert = ForgetExpert(
                study.lm.d_model, self.width, seed=seed, threshold=router.threshold, window=router.window
            )
            expert.requires_grad_(False)
            expert.router.copy_(router.weight)
            expert.bias.fill_(router.bias)
            found[layer] = expert.to(study.lm.device, torch.promote_types(study.lm.dtype, torch.float32))
        return found

    def _routers(self, study: Study) -> dict[int, Router]:
        layers = self._chosen(study)
        sites = [Site("mlp_in", layer) for layer in layers]

        def fit() -> dict[Site, Router]:
            return fit_routers(study.lm, study.scope, sites, self.routing, progress=study.progress)

        return {site.layer: router for site, router in study.once((self.routing, *sites), fit).items()}

    def _chosen(self, study: Study) -> tuple[int, ...]:
        if self.layers == "shift":
            shift = study.once("shift", lambda: feed_forward_shift(study.lm, study.scope, progress=study.progress))
            return most_shifted(shift, self.n_layers)
        for layer in self.layers:
            study.lm.locate(Site("mlp_in", layer))
            study.lm.locate(Site("mlp_out", layer))
        return tuple(sorted(self.layers))
