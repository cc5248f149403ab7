"""Which passages a risk and an objective are evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from ...component import Frozen
from ...data.scope import Scope
from ...errors import EmptyData, InvalidConfig
from ...lm import LM
from ...objectives import Objective
from ...step import Batch, LiveReference, Reference
from ...training import Data, Optimisation
from ...training.data import make_data
from ...training.plan import SIDES
from ...training.references import look_up
from ...training.rows import Split, order

_COUNTERPARTS = {"forget": "retain", "refusal": "retain_refusal"}
_COUNTERPARTS |= {theirs: ours for ours, theirs in _COUNTERPARTS.items()}


class Estimator(Frozen):
    """How gradients are estimated."""

    batches: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    max_length: int = Field(gt=1)
    seed: int
    same_batches: bool
    errors: bool = False
    compat: Literal["paper"] | None = None

    @property
    def same(self) -> bool:
        return self.same_batches or self.compat == "paper"

    def smoothing(self, n: int) -> list[float]:
        """How much is left in the end of each of ``n`` batches' gradients."""
        return [1.0] * n if self.compat is None else [(0.4 if j else 1.0) * 0.6 ** (n - 1 - j) for j in range(n)]


class Sample(NamedTuple):
    """Rows, under the names by which an objective reads them, and what the untouched model says of them."""

    batches: tuple[Mapping[str, Batch], ...]
    reference: Reference
    items: Mapping[str, Sequence[int]]
    """Of each side, which passages they are."""


class Group(NamedTuple):
    """Objectives that read the same side, so that they share forward passes."""

    indices: tuple[int, ...]
    objectives: tuple[Objective, ...]
    sample: Sample


class Drawn(NamedTuple):
    forget: Sample
    """For the risk."""
    retain: Sample
    """For the risk."""
    groups: tuple[Group, ...]


def draw(
    lm: LM,
    scope: Scope,
    objectives: Sequence[Objective],
    risk: Objective,
    estimator: Estimator,
    untouched: LiveReference,
    *,
    batch_size: int | None = None,
) -> Drawn:
    """Passages at random; those of the risk and those of the objectives are not the same, unless that is asked for.

    ``batch_size`` is that of the objectives, where it is not the risk's. Raises EmptyData for a single passage, which
    cannot be shared out, InvalidConfig for a risk that cannot be had of both sides.
    """
    risk_names = {side: {r.split: _on(side, r.split) for r in risk.reads(lm)} for side in ("forget", "retain")}
    own_names = [{r.split: r.split for r in o.reads(lm)} for o in objectives]
    splits = {true for names in (*risk_names.values(), *own_names) for true in names.values()}
    data = make_data(lm, scope, splits, Optimisation(max_length=estimator.max_length, seed=estimator.seed))
    wanted = estimator.batches * estimator.batch_size
    dealt = {side: _deal(side, data.items[side], wanted, estimator) for side in ("forget", "retain")}
    of_risk, of_objectives = ({side: two[i] for side, two in dealt.items()} for i in (0, 1))

    def sample(
        own: Sequence[Objective], names: Mapping[str, str], items: Mapping[str, Sequence[int]], n: int
    ) -> Sample:
        batches, rows = _cut(lm, data, names, items, n)
        reads = [r for o in own for r in o.reads(lm)]
        return Sample(
            batches,
            look_up(untouched, rows, reads, model="", batch_size=2 * n),
            {SIDES[true]: items[SIDES[true]] for true in names.values()},
        )

    by_sides: dict[frozenset[str], list[int]] = {}
    for i, names in enumerate(own_names):
        by_sides.setdefault(frozenset(SIDES[split] for split in names), []).append(i)
    groups = []
    for indices in by_sides.values():
        own = tuple(objectives[i] for i in indices)
        names = {split: split for i in indices for split in own_names[i]}
        found = sample(own, names, of_objectives, batch_size or estimator.batch_size)
        groups.append(Group(tuple(indices), own, found))
    forget, retain = (sample([risk], risk_names[s], of_risk, estimator.batch_size) for s in ("forget", "retain"))
    return Drawn(forget, retain, tuple(groups))


def _on(side: str, split: str) -> str:
    """The split that is read on this side where an objective was written for ``split``."""
    if SIDES[split] == side:
        return split
    if split not in _COUNTERPARTS:
        raise InvalidConfig(f"a risk is taken of forgotten and of retained text, but only one of them has {split!r}")
    return _COUNTERPARTS[split]


def _deal(side: str, items: Sequence[int], wanted: int, estimator: Estimator) -> tuple[list[int], list[int]]:
    mixed = [items[i] for i in order(len(items), seed=estimator.seed, epoch=0)]
    if estimator.same:
        return mixed[:wanted], mixed[:wanted]
    n = min(wanted, len(mixed) // 2)
    if n == 0:
        raise EmptyData(
            f"the risk and the objective are evaluated on different {side} passages, and there is only one: give more, "
            "or same_batches=True, which is biased by the variance of the gradient"
        )
    return mixed[:n], mixed[n : 2 * n]


def _cut(
    lm: LM, data: Data, names: Mapping[str, str], items: Mapping[str, Sequence[int]], batch_size: int
) -> tuple[tuple[dict[str, Batch], ...], dict[str, Split]]:
    """Batches of the rows of ``items`` alone, which are numbered anew."""
    rows = {}
    for name, true in names.items():
        split = data.splits[true]
        rows[name] = Split(tuple(split.rows[split.row_of(i, 0)] for i in items[SIDES[true]]))
    sizes = [len(split.rows) for split in rows.values()]
    n = min(min(sizes), -(-max(sizes) // batch_size))
    cuts = {name: [k * len(split.rows) // n for k in range(n + 1)] for name, split in rows.items()}
    batches = tuple(
        {name: split.batch(range(cuts[name][k], cuts[name][k + 1]), lm.device) for name, split in rows.items()}
        for k in range(n)
    )
    return batches, rows
