"""A router for each of some sites: which tokens are of forget text, told from the token's own activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from ..activations import stream
from ..activations.stream import n_rows
from ..component import Frozen
from ..data.scope import Scope
from ..errors import EmptyData, InvalidData
from ..gates import conformal_threshold
from ..lm import LM, Site
from ..tracking import Progress
from .probe import Views, fit_probe
from .shift import sampled


class Routing(Frozen):
    """How routers are fitted: mean cross-entropy of a token, both classes of the same weight, + ridge |w|^2 / 2."""

    ridge: float = Field(1.0, gt=0)
    """Of activations with unit variance; a sure router is one that has learnt its few passages by heart."""
    false_positives: float = Field(0.01, ge=0, lt=1)
    """Share of the tokens of held-out retained text that may be let through."""
    floor: float = Field(0.01, gt=0, lt=1)
    """No threshold is lower."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the retained passages that only the threshold is chosen on."""
    passages: int = Field(100, gt=1)
    """Of each kind, at most."""
    tokens: int = Field(8192, gt=0)
    """Of each kind, at most; a random choice of what these passages have."""
    seed: int = 0


class Router(NamedTuple):
    """s(h) = sigma(w.h + b), 0 unless above the threshold."""

    weight: Float[Tensor, " d"]
    bias: float
    threshold: float
    recall: float
    """Share of the forget tokens it was fitted on that it lets through."""


class _Tokens(NamedTuple):
    """What is read of a kind of text."""

    activations: dict[Site, Float[Tensor, "n d"]]
    held: Bool[Tensor, " n"]


def fit_routers(
    lm: LM, scope: Scope, sites: Sequence[Site], settings: Routing, *, progress: Progress | None = None
) -> dict[Site, Router]:
    """One pass over the scope's passages. Raises InvalidData where no site tells forget tokens from retained ones."""
    texts = [sampled(lm, passages, settings.passages) for passages in (scope.forget, (*scope.retain, *scope.near))]
    held = _held_out(len(texts[1]), settings)
    forget = _read(lm, sites, texts[0], torch.zeros(len(texts[0]), dtype=torch.bool), settings, progress)
    retain = _read(lm, sites, texts[1], held, settings, progress)
    found = {}
    for site in sites:
        x = retain.activations[site]
        found[site] = fit_router(forget.activations[site], x[~retain.held], x[retain.held], settings)
    if not any(router.recall for router in found.values()):
        raise InvalidData(
            f"no router tells forget tokens from retained ones at {settings.false_positives:.3g} false positives: give "
            "more passages, other layers, or allow more"
        )
    return found


def fit_router(
    forget: Float[Tensor, "n d"], retain: Float[Tensor, "m d"], held: Float[Tensor, "k d"], settings: Routing
) -> Router:
    """The threshold is the lowest, from the floor on, that lets through the allowed share of ``held``."""
    x = torch.cat([forget, retain]).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    ends = torch.arange(1, len(x) + 1)
    even = torch.full((len(x),), 1 / (settings.ridge * len(x)), dtype=x.dtype)
    views = Views(ends - 1, ends, ends <= len(forget), even)
    probe = fit_probe((x - mean) / scale, views, pool="mean")
    weight = (probe.weight / scale).float()
    bias = probe.bias - float(mean @ (probe.weight / scale))
    score = torch.sigmoid(held.float() @ weight + bias)
    threshold = max(conformal_threshold(score, settings.false_positives), settings.floor)
    recall = (torch.sigmoid(forget.float() @ weight + bias) > threshold).float().mean()
    return Router(weight, bias, threshold, float(recall))


def _held_out(n: int, settings: Routing) -> Bool[Tensor, " n"]:
    """Whole passages: the tokens of one are too much alike."""
    if n < 2:
        raise EmptyData("a router needs at least two retained passages: one to learn from, one to test")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    return order < min(max(round(n * settings.held_out), 1), n - 1)


def _read(
    lm: LM,
    sites: Sequence[Site],
    texts: Sequence[Sequence[int]],
    held: Bool[Tensor, " n"],
    settings: Routing,
    progress: Progress | None,
) -> _Tokens:
    """A random choice of all tokens, on the CPU."""
    total = sum(n_rows(text, lm.bos_id) for text in texts)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = torch.randperm(total, generator=generator) < settings.tokens
    parts: list[dict[Site, Tensor]] = []
    owners, start = [], 0
    for rows in stream(lm, sites, texts, progress=progress):
        now = kept[start : start + len(rows.sequence)]
        start += len(rows.sequence)
        parts.append({site: x.cpu()[now].float() for site, x in rows.activations.items()})
        owners.append(rows.sequence.cpu()[now])
    return _Tokens({site: torch.cat([part[site] for part in parts]) for site in sites}, held[torch.cat(owners)])
