"""Unlearn for good what features know: train the layers below them until they no longer fire (arXiv 2508.13650)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import nn

from ..errors import InvalidConfig
from ..features import CountScore, Score, select
from ..lm import LM, Site
from ..lm.locate import blocks
from ..objectives import LowerFeatures, Objective, RetainEmbedding, RetainKL
from ..patches import WeightPatch
from ..training import Log, Optimisation, Probe
from .base import Method, Study
from .finetune import Finetune


class CRISP(Method, Optimisation):
    """Choose the features that fire on the concept, then L = alpha L_features + beta L_retain + gamma L_coherent.

    L_features is ``lower_features`` (the mean over dictionaries), and L_retain keeps the hidden states that they read
    where they were on retained text. L_coherent is KL there, near passages among it; the original takes the squared
    distance of the last hidden states on neutral text near the concept, most of which is the distance of sinks. Its
    weights are (1 - b), b and b g, with b = 0.99 and g = 0.01, its learning rate 1e-5, and its rank 4.
    """

    dictionaries: tuple[str, ...] = Field(min_length=1)
    """Names as ``load_dictionary`` takes them."""
    score: Score = CountScore()
    n: int = Field(10, gt=0)
    """Features of each dictionary."""
    alpha: float = Field(1.0, gt=0)
    beta: float = Field(10.0, ge=0)
    gamma: float = Field(1.0, ge=0)
    adapter: dict[str, Any] | None = Field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    """PEFT's settings; the linear layers of all blocks up to the deepest dictionary where target_modules is not given.
    None trains the weights of those blocks.
    """
    store: Literal["float32", "bfloat16"] = "float32"
    """As of ``finetune``."""

    def fit(self, study: Study, *, log: Log | None = None, probe: Probe | None = None) -> WeightPatch:
        return self.recipe(study).fit(study, log=log, probe=probe)

    def recipe(self, study: Study) -> Finetune:
        """The same as finetuning, with the features that were chosen."""
        study.measure(self.dictionaries)
        sites = [study.dictionary(name).site for name in self.dictionaries]
        settings = {name: getattr(self, name) for name in (*Optimisation.model_fields, "store")}
        return Finetune(objectives=self._objectives(study, sites), **settings, **self._trained(study.lm, max(sites)))

    @property
    def reads(self) -> tuple[tuple[str, ...], tuple[Site, ...]]:
        return self.dictionaries, ()

    def _objectives(self, study: Study, sites: Sequence[Site]) -> tuple[Objective, ...]:
        alpha, beta = (weight / len(sites) for weight in (self.alpha, self.beta))
        chosen = {name: select(study.stats(name), self.score, self.n) for name in self.dictionaries}
        found: list[Objective] = [
            LowerFeatures(dictionary=name, features=features, weight=alpha) for name, features in chosen.items()
        ]
        if beta:
            found += [RetainEmbedding(site=site, where="real", weight=beta) for site in dict.fromkeys(sites)]
        if self.gamma:
            found.append(RetainKL(where="content", weight=self.gamma))
        return tuple(found)

    def _trained(self, lm: LM, deepest: Site) -> dict[str, Any]:
        names = {module: name for name, module in lm.model.named_modules()}
        below = [b for i, b in enumerate(blocks(lm.model)) if Site("resid_pre", i) < deepest]
        if not below:
            raise InvalidConfig(f"no block comes before {deepest}, so nothing that can be trained feeds its features")
        if self.adapter is None:
            return {"parameters": tuple(f"{names[block]}.*" for block in below)}
        if "target_modules" in self.adapter:
            return {"adapter": self.adapter}
        linear = [names[m] for block in below for m in block.modules() if _is_linear(m)]
        if not linear:
            raise InvalidConfig(
                f"{lm.name} has no linear layers as Hugging Face models have them: set adapter to null, which trains "
                "the weights of its blocks"
            )
        return {"adapter": self.adapter | {"target_modules": linear}}


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
