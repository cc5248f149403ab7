"""What is trained on when: a function of the data, the settings and the seed, whoever does the work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InvalidConfig
from ..lm import LM
from ..objectives import Objective
from ..step import Batch, Read
from .rows import Split, order
from .settings import Optimisation

SIDES = {"forget": "forget", "refusal": "forget", "alternate": "forget", "retain": "retain", "retain_refusal": "retain"}
"""Whose items a split's rows belong to."""


@dataclass(frozen=True)
class Data:
    splits: Mapping[str, Split]
    items: Mapping[str, Sequence[int]]
    """The items of each side that are trained on."""
    held: Mapping[str, Sequence[int]]
    """Those that a watch measures."""


class Group(NamedTuple):
    """Objectives that share splits: their losses need one graph, which is freed before the next group's is built."""

    objectives: tuple[Objective, ...]
    indices: tuple[int, ...]
    """Of the objectives among all."""
    reads: tuple[Read, ...]
    splits: tuple[str, ...]


class Plan:
    def __init__(self, lm: LM, objectives: Sequence[Objective], data: Data, settings: Optimisation) -> None:
        self.data, self.settings, self.device = data, settings, lm.device
        self.groups = _groups(lm, objectives)
        sides = [{SIDES[split] for split in group.splits} for group in self.groups]
        read = set().union(*sides)
        if settings.alternate and (len(read) < 2 or any(len(side) > 1 for side in sides)):
            raise InvalidConfig("to alternate takes objectives that forget and others that retain, none that does both")
        self.leads = "forget" if "forget" in read else "retain"
        self._per_side = -(-len(data.items[self.leads]) // settings.batch_size)
        self.per_epoch = self._per_side * (2 if settings.alternate else 1)
        self.n_steps = settings.max_steps or max(1, round(settings.epochs * self.per_epoch))
        if settings.alternate and self.n_steps <= self._per_side:
            raise InvalidConfig(
                f"alternate: the first {self._per_side} steps are on what is kept, and there are {self.n_steps}: take "
                "more steps, or larger ones"
            )

    def epoch(self, step: int) -> int:
        return step // self.per_epoch

    def ends(self, step: int, epochs: float) -> bool:
        """Whether a whole number of these is over after so many steps."""
        length = epochs * self.per_epoch
        return math.floor(step / length) > math.floor((step - 1) / length)

    def rate(self, step: int) -> float:
        """The share of the learning rate."""
        rise = min(round(self.settings.warm_up * self.per_epoch), self.n_steps // 2)
        if step < rise:
            return (step + 1) / rise
        left = (self.n_steps - step) / (self.n_steps - rise)
        match self.settings.schedule:
            case "constant":
                return 1.0
            case "linear":
                return left
            case "cosine":
                return (1 - math.cos(math.pi * left)) / 2

    def items(self, step: int) -> dict[str, list[int]]:
        """Of each side, what the step is taken on."""
        settings, (epoch, place, rests) = self.settings, self._place(step)
        leading, chosen = self.data.items[self.leads], self._leading(step)
        if self.leads == "retain":
            return {"retain": chosen}
        start = (epoch * len(leading) + place * settings.batch_size) * settings.retain_per_forget
        kept = list(self._retained(start, len(chosen) * settings.retain_per_forget))
        return {"forget": chosen, "retain": kept} | ({} if rests is None else {rests: []})

    def progress(self, step: int) -> int:
        """Leading items whose turn it is, also in a step that is taken on those retained beside them."""
        return len(self._leading(step))

    def _place(self, step: int) -> tuple[int, int, str | None]:
        """The epoch, the place in it, and the side that rests."""
        epoch, place = divmod(step, self.per_epoch)
        if not self.settings.alternate:
            return epoch, place, None
        return epoch, place % self._per_side, "forget" if place < self._per_side else "retain"

    def _leading(self, step: int) -> list[int]:
        settings, (epoch, place, _) = self.settings, self._place(step)
        leading = self.data.items[self.leads]
        now = order(len(leading), seed=settings.seed, epoch=epoch)
        return [leading[i] for i in now[place * settings.batch_size : (place + 1) * settings.batch_size]]

    def parts(self, group: Group, items: Mapping[str, Sequence[int]], epoch: int = 0) -> list[dict[str, Batch]]:
        """Batches of a group's splits, cut so that rows of like length go together."""
        sizes = {len(items[SIDES[split]]) for split in group.splits}
        n_parts = min(-(-max(sizes) // self.settings.micro_batch), min(sizes))  # no part may lack a side
        found: list[dict[str, Batch]] = [{} for _ in range(n_parts)]
        for side in dict.fromkeys(SIDES[split] for split in group.splits):
            splits = {name: self.data.splits[name] for name in group.splits if SIDES[name] == side}
            rows = {i: {name: split.row_of(i, epoch) for name, split in splits.items()} for i in set(items[side])}
            length = {i: max(split.lengths[rows[i][name]] for name, split in splits.items()) for i in rows}
            by_length = sorted(items[side], key=lambda i, n=length: (n[i], i))  # type: ignore[misc]
            for k, part in enumerate(found):
                own = by_length[k * len(by_length) // n_parts : (k + 1) * len(by_length) // n_parts]
                part |= {name: split.batch([rows[i][name] for i in own], self.device) for name, split in splits.items()}
        return found

    def _retained(self, start: int, n: int) -> Iterator[int]:
        """One permutation of what is kept after another."""
        pool = self.data.items["retain"]
        laps = range(start // len(pool), (start + n - 1) // len(pool) + 1) if pool else ()
        orders = {lap: order(len(pool), seed=self.settings.seed + 1, epoch=lap) for lap in laps}
        for place in range(start, start + n) if pool else ():
            lap, i = divmod(place, len(pool))
            yield pool[orders[lap][i]]


def _groups(lm: LM, objectives: Sequence[Objective]) -> list[Group]:
    found: list[tuple[set[str], list[int]]] = []
    for i, objective in enumerate(objectives):
        splits, indices = {r.split for r in objective.reads(lm)}, [i]
        for other in [g for g in found if g[0] & splits]:
            found.remove(other)
            splits, indices = splits | other[0], sorted(other[1] + indices)
        found.append((splits, indices))
    return [
        Group(
            tuple(objectives[i] for i in indices),
            tuple(indices),
            tuple(dict.fromkeys(r for i in indices for r in objectives[i].reads(lm))),
            tuple(sorted(splits)),
        )
        for splits, indices in found
    ]
