"""Random adapters for the tiny models, and what a model says under them."""

from __future__ import annotations

import torch
from conftest import D_MODEL, words

from concept_unlearn.dictionaries import direction
from concept_unlearn.lm import Site
from concept_unlearn.patches import AdapterPatch
from concept_unlearn.patches.adapter import Bottleneck, Linear

SITES = (Site("mlp_out", 0), Site("mlp_out", 2))
PROMPTS = [words(7, 8, 9, 10), words(11, 12), words(20, 21, 22, 23, 24, 25, 30), words(40, 41, 42)]
READ = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
SENSOR = direction(Site("resid_pre", 0), READ, READ)


def draw(*shape, seed=0):
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind="bottleneck", *, sites=SITES, d=D_MODEL, width=3, seed=0, **settings):
    shapes = {"down": (width, d), "up": (d, width)} if kind == "bottleneck" else {"map": (d, d)}
    adapters = {}
    for i, site in enumerate(sites):
        weights = {f"{n}.weight": draw(*shape, seed=seed + i) for n, shape in shapes.items()}
        biases = {f"{n}.bias": draw(shape[0], seed=seed + i + 7) for n, shape in shapes.items()}
        adapters[site] = {"bottleneck": Bottleneck, "linear": Linear}[kind].of(weights | biases)
    return AdapterPatch(adapters=adapters, **settings)


def logits(lm, ids, patch=None):
    with torch.no_grad():
        if patch is None:
            return lm.logits(ids)
        with patch.on(lm):
            return lm.logits(ids)
