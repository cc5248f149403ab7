"""Fitting a gate on prompts as users type them: probe questions, messages, and how passages begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor

from ..activations import stream
from ..data.encode import common_prefix, encode_text, has_chat_template
from ..data.examples import Passage
from ..data.scope import IN_SCOPE, OUT_OF_SCOPE, Scope
from ..dictionaries import Slice, direction
from ..gates import Gate, ProbeGate, Signal, conformal_threshold
from ..lm import LM, Site

Progress = Callable[[int], None]

_OPENINGS = (6, 12, 24, 48)
"""Lengths in tokens at which the beginning of a passage stands in for a prompt; the whole passage does too."""
_FOLDS = 5
_REGULARISATION = 10.0
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
    opens: Bool[Tensor, " n"]
    """Passages, whose beginnings count as prompts of their own."""


def fit_gate(lm: LM, gate: Gate, sensor: Slice, scope: Scope, *, progress: Progress | None = None) -> Fitted:
    """The gate with its threshold set so that at most ``alpha`` of retained prompts open it, near and far apart.

    ``sensor`` is what the gate would read by default. A probe gate gets a sensor of its own at the same site:
    a logistic regression on unit-normalised tokens, mean over the prompt, thresholded on folds it was not
    fitted on. A gate without a threshold to fit comes back as it is. ``progress`` hears of prompts.
    """
    if getattr(gate, "above", 0.0) is not None and not isinstance(gate, ProbeGate):
        return Fitted(gate, None)
    prompts = _prompts(lm, scope)
    if isinstance(gate, ProbeGate):
        return _fit_probe(lm, gate, sensor.site, prompts, progress)
    kept = [i for i in range(len(prompts.ids)) if not prompts.in_scope[i]]
    statistics, owners = _statistics(lm, gate, sensor, prompts, kept, progress)
    return Fitted(gate.fitted(_strictest(statistics, prompts.near[kept][owners], getattr(gate, "alpha", 0.0))), None)


def _prompts(lm: LM, scope: Scope) -> Prompts:
    ids: list[list[int]] = []
    flags: list[tuple[bool, bool, bool]] = []

    def add(row: list[int], in_scope: bool, near: bool, opens: bool) -> None:
        ids.append(row)
        flags.append((in_scope, near, opens))

    for name in (*IN_SCOPE, *OUT_OF_SCOPE):
        for probe in getattr(scope, name):
            chat = probe.chat and has_chat_template(lm.tokenizer)
            add(lm.encode(probe.prompt, chat=chat), name in IN_SCOPE, name == "out_near", False)
    for name in ("forget", "near", "retain"):
        for passage in getattr(scope, name):
            in_scope, near = name == "forget", name == "near"
            add(_passage_ids(lm, passage), in_scope, near, passage.prompt is None)
    columns = torch.tensor(flags, dtype=torch.bool)
    skip = [sum(token != lm.bos_id for token in common_prefix(row, lm.chat_head)) for row in ids]
    return Prompts(ids, skip, columns[:, 0], columns[:, 1], columns[:, 2])


def _passage_ids(lm: LM, passage: Passage) -> list[int]:
    """A reply to a message is represented by the message: that is when a gate decides."""
    if passage.prompt is None:
        return encode_text(lm.tokenizer, passage.text)
    return lm.encode(passage.prompt, chat=has_chat_template(lm.tokenizer))


def _statistics(
    lm: LM, gate: Gate, sensor: Slice, prompts: Prompts, kept: Sequence[int], progress: Progress | None
) -> tuple[Float[Tensor, " views"], Int[Tensor, " views"]]:
    values, owners = [], []
    sensor = sensor.to(lm.device)
    for rows in stream(lm, [sensor.site], [prompts.ids[i] for i in kept], progress=progress):
        x = rows.activations[sensor.site]
        tokens = x.float().norm(dim=-1) <= sensor.max_norm
        acts = sensor.encode(x).acts
        for owner in rows.sequence.unique().tolist():
            mine = (rows.sequence == owner).nonzero()[prompts.skip[kept[owner]] :, 0]
            for length in _lengths(len(mine), bool(prompts.opens[kept[owner]])):
                a, t = acts[mine][None, :length], tokens[mine][None, :length]
                values.append(gate.statistic(Signal(a, t, torch.ones_like(t))))
                owners.append(owner)
    return torch.cat(values).cpu(), torch.tensor(owners)


def _fit_probe(lm: LM, gate: ProbeGate, site: Site, prompts: Prompts, progress: Progress | None) -> Fitted:
    pooled, owners, max_norm = _pool(lm, site, prompts, progress)
    label = prompts.in_scope[owners].numpy()
    weight = 1 / np.bincount(owners.numpy(), minlength=len(prompts.ids))[owners.numpy()]
    x = pooled.double().numpy()

    def fit(chosen: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=_REGULARISATION, class_weight="balanced", max_iter=2000)
        return model.fit(x[chosen] * len(x[0]) ** 0.5, label[chosen], sample_weight=weight[chosen])

    if gate.above is None:
        held_out = np.zeros(len(x))
        for train, test in GroupKFold(n_splits=_FOLDS).split(x, label, owners.numpy()):
            held_out[test] = fit(train).decision_function(x[test] * len(x[0]) ** 0.5)
        kept = ~prompts.in_scope[owners]
        scores = torch.from_numpy(held_out).float()[kept]
        gate = gate.model_copy(update={"above": _strictest_value(scores, prompts.near[owners][kept], gate.alpha)})
    final = fit(np.arange(len(x)))
    w = torch.from_numpy(final.coef_[0]).float()
    sensor = direction(
        site, w, w / w.norm(), bias=float(final.intercept_[0]), normalisation="constant_norm_rescale", max_norm=max_norm
    )
    return Fitted(gate, sensor)


def _pool(
    lm: LM, site: Site, prompts: Prompts, progress: Progress | None
) -> tuple[Float[Tensor, "views d"], Int[Tensor, " views"], float]:
    """The mean of unit-normalised tokens of every view, whose view it is, and the norm of a sink."""
    held: dict[int, Tensor] = {}
    for rows in stream(lm, [site], prompts.ids, progress=progress):
        x = rows.activations[site].float().cpu()
        for owner in rows.sequence.unique().tolist():
            held[owner] = x[(rows.sequence == owner).cpu()][prompts.skip[owner] :]
    max_norm = _SINK * float(torch.cat([x.norm(dim=-1) for x in held.values()]).median())
    views, owners = [], []
    for owner, x in sorted(held.items()):
        norm = x.norm(dim=-1, keepdim=True)
        unit = torch.where(norm <= max_norm, x / norm.clamp(min=1e-12), 0.0)
        seen = (norm <= max_norm).cumsum(0).clamp(min=1)
        mean = unit.cumsum(0) / seen
        for length in _lengths(len(x), bool(prompts.opens[owner])):
            views.append(mean[length - 1])
            owners.append(owner)
    return torch.stack(views), torch.tensor(owners), max_norm


def _lengths(n: int, opens: bool) -> list[int]:
    return [*(length for length in _OPENINGS if opens and length < n), n]


def _strictest_value(values: Tensor, near: Tensor, alpha: float) -> float:
    groups = [values[chosen] for chosen in (near, ~near) if chosen.any()]
    return max(conformal_threshold(group, alpha) for group in groups)


def _strictest(values: Tensor, near: Tensor, alpha: float) -> Tensor:
    """The group of retained prompts, near or far, that asks for the higher threshold."""
    groups = [values[chosen] for chosen in (near, ~near) if chosen.any()]
    return max(groups, key=lambda group: conformal_threshold(group, alpha))
