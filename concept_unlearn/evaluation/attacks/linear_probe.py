"""A linear probe: do inner activations still tell true answers from false ones?"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from ...data.encode import pad
from ...data.examples import Probe
from ...errors import EmptyData
from ...features.probe import Views, fit_probe
from ...lm import LM, Site
from ..measured import mean_of
from ..question import encode_probe, encode_reply
from .base import Access, Attack, Outcome, Victim
from .lens import layers

RESULT = "forget/probe_auc"


class LinearProbe(Attack):
    """Logistic regression on the residual stream at an answer's last token, of answers against distractors.

    The value of a question is the share of its distractors that score below its answer, a tie counting half: the area
    under the curve within the question, which neither the regression nor the choice of its layer has seen. Wording
    alone may tell true from false: compare with the model that never saw what is to be forgotten.
    """

    access: ClassVar[Access] = "activations"

    stride: int = Field(4, gt=0)
    """One layer in so many, from the last one down."""
    folds: int = Field(5, ge=3)
    distractors: int = Field(3, gt=0)
    """Of each probe, at most."""
    max_probes: int = Field(400, gt=0)
    """Drawn, where there are more."""
    batch_size: int = Field(16, gt=0)
    seed: int = 0

    def __call__(self, victim: Victim) -> Outcome:
        """Raises EmptyData where fewer probes than folds have a distractor."""
        probes = self._probes(victim)
        rows = [(i, text, j == 0) for i, p in enumerate(probes) for j, text in enumerate(self._texts(p))]
        ids = [
            encode_probe(victim.lm, probes[i]).prompt + encode_reply(victim.lm, probes[i], text) for i, text, _ in rows
        ]
        chosen = layers(victim.lm, self.stride)
        with victim.patch.on(victim.lm) if victim.patch is not None else contextlib.nullcontext():
            acts = last_tokens(victim.lm, ids, [Site("resid_post", n) for n in chosen], self.batch_size)
        owner, right = torch.tensor([i for i, _, _ in rows]), torch.tensor([true for *_, true in rows])
        by_layer = {n: Rows(acts[Site("resid_post", n)], owner, right) for n in chosen}
        fold = torch.tensor(self._deal(len(probes)))
        found = held_out(by_layer, fold)
        layer_of = ", ".join(str(n) for n in found.chosen)
        return Outcome(
            results={RESULT: mean_of(found.best, notes={"layer": layer_of})},
            curve=tuple((n, sum(v) / len(v)) for n, v in found.by_layer.items()),
        )

    def _probes(self, victim: Victim) -> list[Probe]:
        sets = victim.benchmark.sets
        names = dict.fromkeys(name for leak in victim.leaks for name in leak.reads)
        found = [e for name in names for e in sets[name].examples if isinstance(e, Probe) and e.distractors]
        if len(found) < self.folds:
            raise EmptyData(
                f"{self.folds} folds need as many probes with distractors; {victim.benchmark.name} has {len(found)}"
            )
        return random.Random(self.seed).sample(found, min(self.max_probes, len(found)))

    def _texts(self, probe: Probe) -> tuple[str, ...]:
        return (probe.answers[0], *probe.distractors[: self.distractors])

    def _deal(self, n: int) -> list[int]:
        """The fold of each probe, in a random order."""
        return random.Random(f"{self.seed} folds").sample([i % self.folds for i in range(n)], n)


class Rows(NamedTuple):
    """Candidate answers at one layer."""

    acts: Float[Tensor, "rows d"]
    owner: Int[Tensor, " rows"]
    """The probe of each."""
    right: Bool[Tensor, " rows"]

    def of(self, probes: Bool[Tensor, " probes"]) -> Rows:
        kept = probes[self.owner]
        return Rows(self.acts[kept], self.owner[kept], self.right[kept])


class HeldOut(NamedTuple):
    best: list[float]
    """Of each probe, at the layer that was best on the other folds."""
    by_layer: dict[int, list[float]]
    chosen: list[int]
    """By fold."""


def held_out(by_layer: Mapping[int, Rows], fold: Int[Tensor, " probes"]) -> HeldOut:
    """Each probe's value from a regression on other folds; its layer is the best of those folds among themselves."""
    best, chosen = [0.0] * len(fold), []
    outer: dict[int, list[float]] = {layer: [0.0] * len(fold) for layer in by_layer}
    for f in fold.unique().tolist():
        inner = {}
        for layer, rows in by_layer.items():
            for i, value in scored(rows.of(fold != f), rows.of(fold == f)).items():
                outer[layer][i] = value
            rest = [g for g in fold.unique().tolist() if g != f]
            parts = [scored(rows.of((fold != f) & (fold != g)), rows.of(fold == g)) for g in rest]
            values = [value for part in parts for value in part.values()]
            inner[layer] = sum(values) / len(values)
        chosen.append(max(inner, key=lambda layer: inner[layer]))
        for i in (fold == f).nonzero()[:, 0].tolist():
            best[i] = outer[chosen[-1]][i]
    return HeldOut(best, outer, chosen)


def scored(taught: Rows, asked: Rows) -> dict[int, float]:
    """Of each probe that is asked, how its answer ranks by a regression on others."""
    mean, std = taught.acts.mean(0), taught.acts.std(0).clamp(min=1e-6)
    n = len(taught.acts)
    start = torch.arange(n)
    views = Views(start, start + 1, taught.right, torch.ones(n))
    weight = fit_probe((taught.acts - mean) / std, views, pool="mean").weight
    score = ((asked.acts - mean) / std) @ weight
    found = {}
    for i in asked.owner.unique().tolist():
        mine = asked.owner == i
        right, wrong = score[mine & asked.right], score[mine & ~asked.right]
        found[i] = float(((right > wrong).double() + 0.5 * (right == wrong).double()).mean())
    return found


def last_tokens(
    lm: LM, ids: Sequence[Sequence[int]], sites: Sequence[Site], batch_size: int
) -> dict[Site, Float[Tensor, "rows d"]]:
    """Activations at the last token of each row, in float32 on the CPU."""
    found = {site: torch.empty(len(ids), lm.d_model) for site in sites}
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = pad([ids[i] for i in batch], side="right", device=lm.device)
        last = padded.mask.sum(1) - 1
        for site, x in lm.activations(padded.ids, padded.mask, *sites).items():
            found[site][batch] = x[torch.arange(len(batch), device=x.device), last.to(x.device)].float().cpu()
    return found
