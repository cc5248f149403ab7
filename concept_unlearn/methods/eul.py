"""Unlearning layers (EUL, arXiv 2310.20150): small adapters after each feed-forward network of the frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..dictionaries import direction
from ..errors import InvalidConfig
from ..gates import Always, Gate
from ..lm import LM, Site
from ..objectives import GA, Depart, Objective, RetainKL, RetainNLL
from ..patches import AdapterPatch
from ..patches.adapter import Bottleneck, Linear
from ..patches.base import Switch
from ..patches.fusion import with_grams
from ..training import Log, Probe
from ..training.data import make_data
from ..training.modules import train_modules
from ..training.trainable import Trainable
from .base import Study
from .descent import _Descent


class EUL(_Descent):
    """A student that follows its teacher, the model itself, on what is kept, and departs from it on what is not.

    ``fuse`` makes one patch of the patches of successive requests.
    """

    data_kinds = frozenset({"text", "classification"})

    objectives: tuple[Objective, ...] = Field(
        (RetainKL(weight=0.8), Depart(), RetainNLL(), GA(weight=0.2)), min_length=1
    )
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Blocks that get an adapter; None: all."""
    adapter: Literal["bottleneck", "linear"] = "bottleneck"
    """h + U gelu(D h + b_D) + b_U, or h + W h + b."""
    width: int | None = Field(None, gt=0)
    """Of a bottleneck; None: what ``share`` leaves room for."""
    share: float = Field(0.005, gt=0)
    """Of bottlenecks: their parameters as a share of the model's."""
    gate: Gate = Always()
    """When the adapters are on after training: always, or where a probe finds the concept."""
    grams: bool = True
    """Keep what ``fuse`` needs: second moments of the activations on what is forgotten."""
    labels: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field({})
    """For classification: of each label the words that stand for it. The text of every passage is then a label, and
    objectives act on p(label), the sum of the probabilities of its words' first tokens.
    """
    lr: float = Field(5e-5, gt=0)
    alternate: bool = True
    warm_up: float = Field(0.3, ge=0)
    """Epochs in which the learning rate rises: 0.06 of five."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.adapter == "linear" and self.width is not None:
            raise ValueError("a linear adapter is as wide as the model: leave width out")
        if len(self.labels) == 1:
            raise ValueError("one label says nothing: give two or more, or none for text")
        if self.gate.kind not in ("always", "probe"):
            raise ValueError(f"an adapter has no features for a {self.gate.kind} gate to count: use always or probe")
        return self

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> AdapterPatch:
        """``log(step, values)`` hears of every step's losses; ``probe(step)`` may look at the model as it is then."""
        patch = self._initial(study.lm)
        changes = self.train(study, log=log, probe=probe)
        tensors = {name: t + changes[name].dense() if name in changes else t for name, t in patch.tensors().items()}
        patch = AdapterPatch.restore(patch.spec(), {name: t.cpu() for name, t in tensors.items()}, None)
        if self.grams:
            split = make_data(study.lm, study.scope, ["forget"], self, labels=tuple(self.labels)).splits["forget"]
            patch = with_grams(patch, study.lm, [row.ids[:-1] for row in split.rows])  # the last token predicts nothing
        first, nothing = min(patch.adapters), torch.zeros(study.lm.d_model)
        gate, sensor = study.gate(self.gate, direction(Site("resid_pre", first.layer), nothing, nothing))
        return replace(patch, gate=gate, sensor=sensor)

    @property
    def _labels(self) -> dict[str, tuple[str, ...]]:
        return self.labels

    @contextmanager
    def _trainable(self, study: Study) -> Iterator[Trainable]:
        lm = study.lm
        if self.gradient_checkpointing and any(len({r.split for r in o.reads(lm)}) > 1 for o in self.objectives):
            raise InvalidConfig("gradient_checkpointing and adapters do not go with an objective that reads two splits")
        patch = self._initial(lm)
        parameters = {name: nn.Parameter(t) for name, t in patch.tensors().items()}
        live = AdapterPatch.restore(patch.spec(), dict(parameters), None)
        with train_modules(lm, live.edits(lm, Switch()), parameters) as trainable:
            yield trainable

    def _initial(self, lm: LM) -> AdapterPatch:
        """It changes nothing. Raises SiteNotFound where the model has no such block, or no feed-forward network."""
        sites = [Site("mlp_out", layer) for layer in self.layers or range(lm.n_layers)]
        for site in sites:
            lm.locate(site)
        d, dtype = lm.d_model, torch.promote_types(lm.dtype, torch.float32)
        if self.adapter == "linear":
            return AdapterPatch(adapters={site: Linear.of(_zeros("map", d, d, lm.device, dtype)) for site in sites})
        width = self.width or self._width(lm, len(sites))
        generator, adapters = torch.Generator().manual_seed(self.seed), {}
        for site in sites:
            down = torch.randn(width, d, generator=generator).to(lm.device, dtype) / d**0.5
            zeros = _zeros("down", d, width, lm.device, dtype) | _zeros("up", width, d, lm.device, dtype)
            adapters[site] = Bottleneck.of(zeros | {"down.weight": down})
        return AdapterPatch(adapters=adapters)

    def _width(self, lm: LM, n: int) -> int:
        """The widest with at most ``share`` of the parameters: n (m (2 d + 1) + d) of them, m at least 1."""
        room = self.share * sum(p.numel() for p in lm.model.parameters()) / n
        return max(int((room - lm.d_model) / (2 * lm.d_model + 1)), 1)


def _zeros(name: str, d_in: int, d_out: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.zeros(d_out, d_in, device=device, dtype=dtype),
        f"{name}.bias": torch.zeros(d_out, device=device, dtype=dtype),
    }
