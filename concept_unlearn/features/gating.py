"""Fitting a gate on prompts as users type them: probe questions, messages, and passages whole and in part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..activations import stream
from ..data.encode import common_prefix, encode_text, has_chat_template
from ..data.examples import Passage
from ..data.scope import IN_SCOPE, OUT_OF_SCOPE, Scope
from ..dictionaries import Slice, direction
from ..errors import EmptyData
from ..gates import Gate, ProbeGate, Signal, conformal_threshold
from ..lm import LM, Site
from ..tracking import Progress
from .probe import Views, fit_probe

_MAX_PASSAGES = 200
"""Of each kind, evenly spread over what the scope has."""
_OPENINGS = (6, 12, 24, 48)
"""Lengths in tokens at which the beginning of a passage stands in for a prompt."""
_WINDOW, _MAX_WINDOWS = 16, 6
"""Later stretches of a passage that do so too."""
_TYPED = 4.0
"""How many passages a prompt counts for that was written as one."""
_FOLDS = 5
_SINK = 5.0


class Fitted(NamedTuple):
    gate: Gate
    sensor: Slice | None


class Prompts(NamedTuple):
    ids: list[list[int]]
    skip: list[int]
    """Rows of each that a gate does not read: what every chat begins with."""
    in_scope: Bool[Tensor, " n"]
    near: Bool[Tensor, " n"]
    """Of the retained ones, those that neighbour the concept."""
    typed: Bool[Tensor, " n"]
    """Written as a prompt; the others are passages, parts of which count as prompts of their own."""


def fit_gate(lm: LM, gate: Gate, sensor: Slice, scope: Scope, *, progress: Progress | None = None) -> Fitted:
    """The gate with its threshold set so that at most ``alpha`` of retained prompts open it, near and far apart.

    ``sensor`` is what the gate would read by default. A probe gate gets a sensor of its own at the same site,
    on unit-normalised tokens, with a threshold from folds it was not fitted on. A gate without a threshold to
    fit comes back as it is. ``progress`` hears of prompts.
    """
    if getattr(gate, "above", 0.0) is not None and not isinstance(gate, ProbeGate):
        return Fitted(gate, None)
    prompts = _prompts(lm, scope)
    if isinstance(gate, ProbeGate):
        return _fit_probe_gate(lm, gate, sensor.site, prompts, progress)
    sensor = sensor.to(torch.device("cpu"))
    texts = _read(lm, sensor.site, prompts, progress)
    statistics = [_statistic(gate, sensor.encode(x).acts, x.norm(dim=-1) <= sensor.max_norm) for x in texts]
    return Fitted(gate.fitted(_strictest(torch.stack(statistics), prompts, getattr(gate, "alpha", 0.0))), None)


def _prompts(lm: LM, scope: Scope) -> Prompts:
    ids: list[list[int]] = []
    flags: list[tuple[bool, bool, bool]] = []
    for name in (*IN_SCOPE, *OUT_OF_SCOPE):
        for probe in getattr(scope, name):
            ids.append(lm.encode(probe.prompt, chat=probe.chat and has_chat_template(lm.tokenizer)))
            flags.append((name in IN_SCOPE, name == "out_near", True))
    for name in ("forget", "near", "retain"):
        passages = getattr(scope, name)
        for passage in passages[:: max(math.ceil(len(passages) / _MAX_PASSAGES), 1)]:
            ids.append(_passage_ids(lm, passage))
            flags.append((name == "forget", name == "near", passage.prompt is not None))
    columns = torch.tensor(flags, dtype=torch.bool)
    skip = [sum(token != lm.bos_id for token in common_prefix(row, lm.chat_head)) for row in ids]
    return Prompts(ids, skip, columns[:, 0], columns[:, 1], columns[:, 2])


def _passage_ids(lm: LM, passage: Passage) -> list[int]:
    """A reply to a message is represented by the message: that is when a gate decides."""
    if passage.prompt is None:
        return encode_text(lm.tokenizer, passage.text)
    return lm.encode(passage.prompt, chat=has_chat_template(lm.tokenizer))


def _read(lm: LM, site: Site, prompts: Prompts, progress: Progress | None) -> list[Float[Tensor, "tokens d"]]:
    """What a gate may read of each prompt, on the CPU."""
    found: dict[int, Tensor] = {}
    for rows in stream(lm, [site], prompts.ids, progress=progress):
        x = rows.activations[site].float().cpu()
        owners = rows.sequence.cpu()
        for owner in owners.unique().tolist():
            found[owner] = x[owners == owner][prompts.skip[owner] :]
    nothing = next(iter(found.values()))[:0]
    return [found.get(i, nothing) for i in range(len(prompts.ids))]


def _statistic(gate: Gate, acts: Float[Tensor, "tokens k"], tokens: Bool[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Of one text; nothing to read is less than any threshold."""
    if not len(tokens):
        return torch.tensor(-torch.inf, dtype=torch.float64)
    return gate.statistic(Signal(acts[None], tokens[None], torch.ones_like(tokens)[None]))[0].double()


def _strictest(statistics: Float[Tensor, " n"], prompts: Prompts, alpha: float) -> Tensor:
    """The statistics of those retained prompts, near or far, that ask for the higher threshold."""
    groups = [statistics[~prompts.in_scope & (prompts.near == near)] for near in (True, False)]
    return max((group for group in groups if len(group)), key=lambda group: conformal_threshold(group, alpha))


def _fit_probe_gate(lm: LM, gate: ProbeGate, site: Site, prompts: Prompts, progress: Progress | None) -> Fitted:
    texts = _read(lm, site, prompts, progress)
    max_norm = _SINK * float(torch.cat([x.norm(dim=-1) for x in texts]).median())
    texts = [x[x.norm(dim=-1) <= max_norm] for x in texts]
    tokens = torch.cat(texts)
    tokens = tokens * (tokens.shape[1] ** 0.5 / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    views, owner = _views([len(x) for x in texts], prompts)
    if gate.above is None:
        stops = torch.tensor([len(x) for x in texts]).cumsum(0).tolist()
        statistics = torch.zeros(len(texts), dtype=torch.float64)
        for held_out in _folds(~prompts.in_scope):
            others = Views(*(part[~held_out[owner]] for part in views))
            probe = fit_probe(tokens, others, pool=gate.pool)
            score = (tokens @ probe.weight + probe.bias)[:, None]
            for i in held_out.nonzero()[:, 0].tolist():
                mine = score[stops[i] - len(texts[i]) : stops[i]]
                statistics[i] = _statistic(gate, mine, torch.ones(len(mine), dtype=torch.bool))
        gate = gate.fitted(_strictest(statistics, prompts, gate.alpha))
    probe = fit_probe(tokens, views, pool=gate.pool)
    sensor = direction(
        site, probe.weight, probe.weight / probe.weight.norm(),
        bias=probe.bias, normalisation="constant_norm_rescale", max_norm=max_norm,
    )  # fmt: skip
    return Fitted(gate, sensor)


def _views(lengths: Sequence[int], prompts: Prompts) -> tuple[Views, Tensor]:
    """Every prompt whole, passages also in part, and which prompt each view is of. The views of a prompt share its
    weight.
    """
    found: list[tuple[int, int, int, float]] = []
    first = 0
    for i, n in enumerate(lengths):
        parts = [(0, n)] if n else []
        if not prompts.typed[i]:
            parts += [(0, length) for length in _OPENINGS if length < n]
            parts += [(at, at + _WINDOW) for at in range(_WINDOW, n - _WINDOW + 1, _WINDOW)][:_MAX_WINDOWS]
        weight = (_TYPED if prompts.typed[i] else 1.0) / max(len(parts), 1)
        found += [(i, first + start, first + stop, weight) for start, stop in parts]
        first += n
    owner, start, stop, weights = zip(*found, strict=True)
    which = torch.tensor(owner)
    return Views(torch.tensor(start), torch.tensor(stop), prompts.in_scope[which], torch.tensor(weights)), which


def _folds(retained: Bool[Tensor, " n"]) -> list[Bool[Tensor, " n"]]:
    """The retained prompts in a few groups as even as can be, by a fixed shuffle; each is held out once."""
    chosen = retained.nonzero()[:, 0]
    if len(chosen) < 2:
        raise EmptyData("a probe gate needs at least two retained prompts or passages: one to learn from, one to test")
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    folds = [torch.zeros_like(retained) for _ in range(min(_FOLDS, len(chosen)))]
    for i, fold in enumerate(folds):
        fold[chosen[i :: len(folds)]] = True
    return folds
