"""Effects as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import UnknownName

Level = Literal["total", "group", "layer"]


class Effect(NamedTuple):
    """Of one objective, at one step of a run, in one part of the model."""

    step: int
    objective: str
    level: Level
    part: str
    """total; embed, shallow, middle, deep (thirds of the blocks) or head; or a block's number."""
    unlearning: float
    """e_u, wanted far below 0."""
    retaining: float
    """e_r, wanted at 0 or above."""
    unlearning_error: float | None
    """Standard error over batches, of the risk's gradient and of the objective's; None where it was not asked for."""
    retaining_error: float | None


@dataclass(frozen=True)
class GEffect:
    """Effects as one tidy table: groups sum to the total, and so do layers."""

    rows: tuple[Effect, ...]
    settings: Mapping[str, Any]
    """What was measured, and on how much."""

    def at(self, objective: str | None = None, part: str = "total", step: int | None = None) -> Effect:
        """The first row that fits. Raises UnknownName."""
        for row in self.rows:
            if row.part == part and objective in (None, row.objective) and step in (None, row.step):
                return row
        known = [f"{r.part} of {r.objective} at {r.step}" for r in self.rows if r.level != "layer"]
        raise UnknownName("effect", f"{part} of {objective or 'any'} at {'any' if step is None else step}", known)

    @property
    def objectives(self) -> list[str]:
        return list(dict.fromkeys(r.objective for r in self.rows))

    def to_json(self) -> str:
        return json.dumps({"settings": self.settings, "rows": [r._asdict() for r in self.rows]}, indent=1)


def groups(layer_names: Sequence[str]) -> dict[str, list[int]]:
    """Thirds of the blocks, between embed and head."""
    last = len(layer_names) - 1
    found: dict[str, list[int]] = {"embed": [0], "shallow": [], "middle": [], "deep": [], "head": [last]}
    for block in range(last - 1):
        found[("shallow", "middle", "deep")[3 * block // (last - 1)]].append(block + 1)
    return found


def table(
    step: int,
    objective: str,
    layer_names: Sequence[str],
    of_objective: Tensor,
    of_risk: Sequence[Tensor] | None = None,
    same: bool = False,
) -> Iterator[Effect]:
    """Of shares [batch, (forget, retain), layer] of the objective's batches, and [batch, layer] of each risk's."""
    everything = list(range(len(layer_names)))
    parts: list[tuple[Level, str, list[int]]] = [("total", "total", everything)]
    parts += [("group", name, own) for name, own in groups(layer_names).items()]
    parts += [("layer", name, [i]) for i, name in enumerate(layer_names)]
    for level, part, own in parts:
        mine = of_objective[..., own].sum(-1)
        values = mine.sum(0).tolist()
        errors: list[float | None] = [None, None]
        if of_risk is not None:
            errors = [_error(mine[:, k], of_risk[k][:, own].sum(-1), same) for k in (0, 1)]
        yield Effect(step, objective, level, part, *values, *errors)


def _error(of_objective: Tensor, of_risk: Tensor, same: bool) -> float | None:
    """Of a sum of shares; to first order e varies as much as those of both sides do, together where they are of the
    same batches. Where noise outweighs the gradients this is too much, by sqrt(2) at most.
    """
    sums = [of_objective + of_risk] if same and len(of_objective) == len(of_risk) else [of_objective, of_risk]
    if min(map(len, sums)) < 2:
        return None
    return float(torch.stack([len(s) * s.var() for s in sums]).sum().sqrt())
