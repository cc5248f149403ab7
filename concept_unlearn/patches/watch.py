"""A patch that is watched while it works: what the features that it edits say of each token, and what its gates say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..component import Frozen
from ..dictionaries import Slice
from ..gates import Always, Gate, Signal
from ..lm import LM, Context, EditFn, Site
from ..lm.context import Memory
from ..lm.locate import root
from ..lm.own import Insertion, insertions, own
from .activation import ActivationPatch
from .base import Patch, Stack, Switch, parts
from .codebook import CodebookPatch, CodeSlice
from .feature import FeaturePatch
from .prefix import PrefixPatch


class Fired(Frozen):
    """A feature that the patch edits, on one token, before it was edited there."""

    site: str
    feature: int
    act: float


class GateReading(Frozen):
    """What one gate read in the prompt."""

    kind: str
    part: int = 0
    """Of a stack: whose gate it is, counted from 0 through all that are in it."""
    opened: int
    """Tokens that it let through."""
    statistic: float | None
    """What it compares with its threshold; None for a gate that has none."""
    threshold: float | None


class Watch:
    """Sees one sequence pass by, pass after pass, with the patch on or off."""

    def __init__(self, patch: Patch, lm: LM) -> None:
        self._lm, self._reads = lm, _reads(patch)
        self._sites = sorted({site for part in parts(patch) for site in _sites(part, lm)})
        at_work = insertions(root(lm.model))
        self._watched, self.heard = _watched(patch, count(), at_work)
        self.seen, self.edited = Seen(at_work), Seen(at_work)

    @contextmanager
    def on(self, *, patched: bool = True) -> Iterator[Watch]:
        """The patch on, where it is to be, between what sees the activations before it and after it."""
        with ExitStack() as stack:
            stack.enter_context(self._lm.edit(self.seen.at(self._sites)))
            if patched:
                stack.enter_context(self._watched.on(self._lm))
                stack.enter_context(self._lm.edit(self.edited.at(self._sites)))
            yield self

    def fired(self, ids: Sequence[int]) -> list[tuple[Fired, ...]]:
        """Of each token of the last pass, the strongest first. Not on BOS or a sink: a patch does not look at those."""
        found: list[list[Fired]] = [[] for _ in ids]
        for site, chosen in self._reads:
            x = self.seen.x[site]
            acts = chosen.to(x.device).encode(x).acts
            content = torch.tensor([token != self._lm.bos_id for token in ids], device=x.device)
            measured = content & (x.norm(dim=-1) <= chosen.max_norm)
            for t, k in ((acts != 0) & measured[:, None]).nonzero().tolist():
                found[t].append(Fired(site=str(site), feature=chosen.features[k], act=float(acts[t, k])))
        return [tuple(sorted(own, key=lambda f: -abs(f.act))) for own in found]

    def moved(self, n: int) -> list[float]:
        """How far the last pass's activations were moved, as a share of their norm: at the site where that is most."""
        most = torch.zeros(n)
        for site, x in self.seen.x.items():
            share = (self.edited.x[site] - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)
            most = torch.maximum(most, share.cpu())
        found: list[float] = most.tolist()
        return found

    def is_open(self) -> list[bool] | None:
        """Of each token of the sequence so far, whether any gate let it through; None where no gate was asked."""
        found = [heard.open for heard in self.heard if heard.open is not None]
        if not found:
            return None
        either: list[bool] = torch.stack(found).any(0).tolist()
        return either

    def readings(self) -> tuple[GateReading, ...]:
        return tuple(heard.reading() for heard in self.heard if heard.open is not None)


class Heard:
    """What one gate was asked in the first pass, and what it said."""

    def __init__(self, gate: Gate, part: int, at_work: list[Insertion]) -> None:
        self.gate, self.part, self._at_work = gate, part, at_work
        self.signal: Signal | None = None
        self.open: Bool[Tensor, " seq"] | None = None

    def hear(self, signal: Signal, decision: Bool[Tensor, "batch seq"]) -> None:
        found = decision & signal.tokens if self.gate.per_token else decision
        now = own(found[..., None], self._at_work)[0, :, 0].cpu()
        if self.open is not None and len(now) != len(self.open):
            return  # the model's answer, token by token
        self.signal = self.signal or signal
        self.open = now if self.open is None else self.open | now

    def reading(self) -> GateReading:
        assert self.signal is not None
        assert self.open is not None
        threshold = getattr(self.gate, "above", None)
        has_statistic = type(self.gate).statistic is not Gate.statistic
        statistic = float(self.gate.statistic(self.signal)[0]) if has_statistic else None
        return GateReading(
            kind=self.gate.kind, part=self.part, opened=int(self.open.sum()), statistic=statistic, threshold=threshold
        )


class Seen:
    """Activations of a pass at the tokens that were given, as they were at one moment."""

    def __init__(self, at_work: list[Insertion]) -> None:
        self._at_work = at_work
        self.x: dict[Site, Float[Tensor, "seq d"]] = {}

    def at(self, sites: Sequence[Site]) -> dict[Site, EditFn]:
        return {site: self._keep(site) for site in sites}

    def _keep(self, site: Site) -> EditFn:
        def keep(x: Tensor, _: Context) -> Tensor:
            self.x[site] = own(x, self._at_work)[0].float().clone()
            return x

        return keep


class _WatchedGate(Gate):
    """A gate that says what another says, and who hears of it."""

    gate: Gate
    heard: Any

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        decision = self.gate(signal, memory)
        self.heard.hear(signal, decision)
        return decision

    @property
    def per_token(self) -> bool:
        return self.gate.per_token


class _Read(NamedTuple):
    site: Site
    slice: Slice


def _watched(patch: Patch, numbers: Iterator[int], at_work: list[Insertion]) -> tuple[Patch, list[Heard]]:
    """The same patch, with gates that are heard. An edit without a gate has nothing to hear."""
    if isinstance(patch, Stack):
        pairs = [_watched(inner, numbers, at_work) for inner in patch.patches]
        return replace(patch, patches=tuple(p for p, _ in pairs)), [h for _, heard in pairs for h in heard]
    number = next(numbers)
    if not isinstance(patch, ActivationPatch | PrefixPatch) or isinstance(patch.gate, Always):
        return patch, []
    heard = Heard(patch.gate, number, at_work)
    return replace(patch, gate=_WatchedGate(gate=patch.gate, heard=heard)), [heard]


def _sites(patch: Patch, lm: LM) -> set[Site]:
    return set(patch.edits(lm, Switch())) if isinstance(patch, ActivationPatch) else set()


def _reads(patch: Patch) -> list[_Read]:
    """The features that the parts of a patch edit."""
    found: list[_Read] = []
    for part in parts(patch):
        if isinstance(part, FeaturePatch):
            found += [_Read(s.site, s) for s in part.slices]
        if isinstance(part, CodebookPatch) and part.banned:
            found.append(_Read(part.codebook.site, CodeSlice(part.codebook, part.banned)))
    return found
