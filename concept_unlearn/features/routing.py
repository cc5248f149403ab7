"""A router for each of some sites: which tokens are of forget text, told from a few activations up to the token's own.

Most tokens of a passage on chess are words like "the", which by themselves say nothing of it: a router that has only
them to judge by learns little. By the soft maximum over the last tokens a word is of chess where one was lately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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
from .probe import Probe, Views, fit_probe, pool_views
from .shift import sampled


class Routing(Frozen):
    """How routers are fitted: mean cross-entropy of a token, both classes of the same weight, + ridge |w|^2 / 2."""

    ridge: float = Field(0.1, gt=0)
    """Of activations with unit variance; a sure router is one that has learnt its few passages by heart."""
    window: int = Field(32, gt=0)
    """Of how many tokens, up to its own, a token's score is the soft maximum; 1: its own alone."""
    false_positives: float = Field(0.01, ge=0, lt=1)
    """Share of the tokens of retained text, by routers that were not fitted on it, that may be let through."""
    floor: float = Field(0.01, gt=0, lt=1)
    """No threshold is lower."""
    folds: int = Field(4, gt=1)
    """Of the retained passages: for the threshold each is judged by a router that was not fitted on it."""
    passages: int = Field(100, gt=1)
    """Of each kind, at most."""
    tokens: int = Field(8192, gt=0)
    """Of each kind, about so many at most: a stretch of each passage, from a random place on."""
    seed: int = 0


class Router(NamedTuple):
    """s_t = sigma(soft maximum of w.h + b over the window up to t), 0 unless above the threshold."""

    weight: Float[Tensor, " d"]
    bias: float
    threshold: float
    window: int
    recall: float
    """Share of the forget tokens it was fitted on that it lets through."""


class Texts(NamedTuple):
    """What is read of a kind of text; the tokens of a text follow one another in order."""

    x: Float[Tensor, "n d"]
    text: Int[Tensor, " n"]

    def starts(self, window: int) -> Int[Tensor, " n"]:
        """Of each token where its window begins: so many tokens back, or at the first of its text."""
        at = torch.arange(len(self.text))
        is_first = torch.ones(len(at), dtype=torch.bool)
        is_first[1:] = self.text[1:] != self.text[:-1]
        return torch.maximum(torch.where(is_first, at, 0).cummax(0).values, at - window + 1)


def fit_routers(
    lm: LM, scope: Scope, sites: Sequence[Site], settings: Routing, *, progress: Progress | None = None
) -> dict[Site, Router]:
    """One pass over the scope's passages. Raises InvalidData where no site tells forget tokens from retained ones."""
    texts = [sampled(lm, passages, settings.passages) for passages in (scope.forget, (*scope.retain, *scope.near))]
    forget, retain = (_read(lm, sites, some, settings, progress) for some in texts)
    found = {site: fit_router(forget[site], retain[site], settings) for site in sites}
    if not any(router.recall for router in found.values()):
        raise InvalidData(
            f"no router tells forget tokens from retained ones at {settings.false_positives:.3g} false positives: give "
            "more passages, other layers, or allow more"
        )
    return found


def fit_router(forget: Texts, retain: Texts, settings: Routing) -> Router:
    """The threshold is the lowest, from the floor on, that lets through the allowed share of retained tokens.

    Raises EmptyData where there is but one retained text.
    """
    x = torch.cat([forget.x, retain.x]).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, n = (x - mean) / scale, len(forget.x)
    starts = torch.cat([forget.starts(settings.window), retain.starts(settings.window) + n])
    fold = torch.cat([torch.full((n,), -1), _folds(retain.text, settings)])

    def views(mine: Bool[Tensor, " n"]) -> Views:
        at = mine.nonzero()[:, 0]
        even = torch.full((len(at),), 1 / (settings.ridge * len(at)), dtype=x.dtype)
        return Views(starts[at], at + 1, at < n, even)

    def score(probe: Probe, mine: Bool[Tensor, " n"]) -> Float[Tensor, " some"]:
        return torch.sigmoid(pool_views(x @ probe.weight + probe.bias, views(mine), "soft"))

    held = torch.cat(
        [score(fit_probe(x, views(fold != k), pool="soft"), fold == k) for k in fold[n:].unique().tolist()]
    )
    threshold = max(conformal_threshold(held, settings.false_positives), settings.floor)
    probe = fit_probe(x, views(fold > -2), pool="soft")
    recall = float((score(probe, fold == -1) > threshold).float().mean())
    weight = probe.weight / scale
    return Router(weight.float(), probe.bias - float(mean @ weight), threshold, settings.window, recall)


def _folds(text: Int[Tensor, " n"], settings: Routing) -> Int[Tensor, " n"]:
    """Of each token. Whole texts: the tokens of one are too much alike."""
    names, which = text.unique(return_inverse=True)
    if len(names) < 2:
        raise EmptyData("a router needs at least two retained passages: one to learn from, one to test")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(settings.seed))
    return (order % settings.folds)[which]


def _read(
    lm: LM, sites: Sequence[Site], texts: Sequence[Sequence[int]], settings: Routing, progress: Progress | None
) -> dict[Site, Texts]:
    """A stretch of each text without what every chat begins with, on the CPU."""
    length = max(settings.tokens // len(texts), 1)
    generator = torch.Generator().manual_seed(settings.seed)
    spare = [max(n_rows(text, lm.bos_id, lm.chat_head) - length, 0) for text in texts]
    first = torch.tensor([int(torch.randint(n + 1, (), generator=generator)) for n in spare])
    parts: list[dict[Site, Tensor]] = []
    owners = []
    for rows in stream(lm, sites, texts, skip=lm.chat_head, progress=progress):
        owner = rows.sequence.cpu()
        at = torch.arange(len(owner))
        begins = torch.ones(len(owner), dtype=torch.bool)
        begins[1:] = owner[1:] != owner[:-1]
        place = at - torch.where(begins, at, 0).cummax(0).values - first[owner]
        kept = (place >= 0) & (place < length)
        parts.append({site: x.cpu()[kept].float() for site, x in rows.activations.items()})
        owners.append(owner[kept])
    text = torch.cat(owners)
    return {site: Texts(torch.cat([part[site] for part in parts]), text) for site in sites}
