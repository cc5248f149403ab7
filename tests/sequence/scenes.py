"""Topics of a tiny model, each with questions that it answers."""

from __future__ import annotations

import random
from typing import Any

from conftest import _known, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.lm import LM

FIRST, SECOND, THIRD = range(38, 46), range(30, 38), range(24, 30)
KEPT = range(8, 24)


def topic(lm: LM, name: str, pool: range, **changes: Any) -> Scope:
    """Half of it is learned from, half is asked."""
    rng = random.Random(pool.start)

    def texts(own: range, n: int) -> list[str]:
        return [words(*rng.choices(own, k=6)) for _ in range(n)]

    parts = {
        "forget": texts(pool, 8), "retain": texts(KEPT, 8), "in_easy": _known(lm, pool),
        "out_near": _known(lm, KEPT[:8]), "out_far": _known(lm, KEPT[8:]),
    }  # fmt: skip
    return Scope.of(name, **(parts | changes))
