"""How much is forgotten and kept while a model is trained, and the best that there was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lm import LM
from ..lm.head import Ending
from ..step import Read, Step
from ..weights import Delta, restore_delta
from .plan import Data
from .settings import Watch


class Measured(NamedTuple):
    """Mean probability of an answer, exp(-N_i / n_i)."""

    forget: float
    retain: float


class Best(NamedTuple):
    step: int
    measured: Measured
    deltas: dict[str, Delta]


class Watcher:
    def __init__(
        self,
        lm: LM,
        head: Ending,
        data: Data,
        watch: Watch,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        micro_batch: int,
    ) -> None:
        """The model as it is now is what is measured against."""
        self._lm, self._head, self._data, self._watch, self._autocast = lm, head, data, watch, autocast
        self._micro_batch = micro_batch
        self.base = self.measure()
        self.best: Best | None = None
        self.too_low = 0

    @property
    def every(self) -> float:
        return self._watch.every

    @property
    def enough(self) -> bool:
        """Whether patience is over."""
        return self.too_low >= self._watch.patience

    def look(self, step: int, deltas: Callable[[], dict[str, Delta]]) -> Measured:
        """Measure, and keep ``deltas()`` if this is the best so far."""
        now = self.measure()
        if self.best is None or self._rank(now) < self._rank(self.best.measured):
            self.best = Best(step, now, deltas())
        self.too_low = 0 if self._keeps(now) else self.too_low + 1
        return now

    def outcome(self) -> dict[str, Delta]:
        """The best, with a warning where it does not keep what was asked."""
        assert self.best is not None
        if not self._keeps(self.best.measured):
            warnings.warn(
                f"no step kept {self._watch.keep:.0%} of the retained answers' probability; the best, step "
                f"{self.best.step}, keeps {self.best.measured.retain / self.base.retain:.0%}",
                stacklevel=2,
            )
        return self.best.deltas

    @torch.no_grad()
    def measure(self) -> Measured:
        return Measured(*map(self._probability, Measured._fields))

    def _probability(self, split: str) -> float:
        rows, found = list(self._data.held[split])[: self._watch.passages], []
        for start in range(0, len(rows), self._micro_batch):
            batch = self._data.splits[split].batch(rows[start : start + self._micro_batch], self._lm.device)
            step = Step(self._lm, {split: batch}, [Read(split)], head=self._head)
            with self._autocast():
                mean = step.per_sequence(split, step.nll(split)) / batch.lengths().clamp(min=1)
            found += (-mean).exp().tolist()
        return float(sum(found)) / max(len(found), 1)

    def _keeps(self, measured: Measured) -> bool:
        return measured.retain >= self._watch.keep * self.base.retain

    def _rank(self, measured: Measured) -> tuple[bool, float]:
        """Smaller is better: what keeps enough by how much is forgotten, the rest by how much is kept."""
        keeps = self._keeps(measured)
        return (not keeps, measured.forget if keeps else -measured.retain)

    # To be stopped and go on.

    def notes(self) -> dict[str, Any]:
        best = self.best and {
            "step": self.best.step,
            "measured": self.best.measured,
            "specs": {name: delta.spec() for name, delta in self.best.deltas.items()},
        }
        return {"too_low": self.too_low, "best": best}

    def tensors(self) -> dict[str, Tensor]:
        deltas = self.best.deltas if self.best else {}
        return {f"best/{name}/{part}": t for name, delta in deltas.items() for part, t in delta.tensors().items()}

    def restore(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.too_low, best = notes["too_low"], notes["best"]
        if best:
            deltas = {}
            for name, spec in best["specs"].items():
                prefix = f"best/{name}/"
                own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                deltas[name] = restore_delta(spec, own)
            self.best = Best(best["step"], Measured(*best["measured"]), deltas)
