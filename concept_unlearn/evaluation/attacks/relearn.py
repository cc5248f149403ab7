"""Relearning: a few steps of training on a little of what was forgotten, or on anything (arXiv 2406.13356)."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from ...activations.processes import Processes
from ...data.examples import Passage, Probe, normalise
from ...data.scope import Scope
from ...errors import EmptyData, InvalidConfig
from ...files import write_atomically
from ...methods import Finetune, Study
from ...objectives import RetainNLL
from ...patches import Patch, WeightPatch
from ...training.loop import Probe as Look
from ...training.sharded import is_sharded
from ..metric import Metric
from ..view import Asked
from .base import Access, Attack, Outcome, Victim, Way, upon

_CHECKPOINT_EVERY = 25


class Relearn(Attack):
    """Go down the plain loss of a few passages with the patch on; leaks are measured on those that were not among them.

    A probe is cut from the sets if its prompt is that of a relearned passage or stands in its text; ``held_out`` in the
    notes is how many examples are left of how many. With a folder a stopped attack goes on.
    """

    access: ClassVar[Access] = "weights"

    data: Literal["forget", "general"] = "forget"
    """Passages of the scope: some of those to forget, or of those to retain, which say nothing of it."""
    k: int = Field(20, gt=0)
    """How many passages, drawn; all where there are fewer."""
    steps: int = Field(50, gt=0)
    lr: float = Field(2e-5, gt=0)
    batch_size: int = Field(8, gt=0)
    at: tuple[int, ...] = ()
    """Steps at which to look on the way, for the curve; 0 is before the first."""
    seed: int = 0

    def __call__(self, victim: Victim) -> Outcome:
        """Raises EmptyData where nothing is left to ask."""
        passages = self.passages(victim.scope)
        leaks, sets, notes = held_out(victim, passages)
        headline = leaks[0]
        kept = _Curve(None if victim.folder is None else victim.folder / "curve.json")

        def look(step: int) -> None:
            if step in self.at and step < self.steps and step not in kept.values:
                # The patch is on and the weights are those of the moment: the model is asked as it is.
                found = victim.measure(Way(None, sets), [headline])
                kept.add(step, found[headline.name].value)

        patch = self.tampered(victim, look=look)
        results = victim.measure(Way(patch, sets, notes), leaks, "relearned")
        curve = kept.values | {self.steps: results[headline.name].value}
        return Outcome(results=results, curve=tuple((n, y) for n, y in sorted(curve.items()) if y is not None))

    def tampered(self, victim: Victim, *, look: Look | None = None) -> Patch:
        """The victim's patch with what relearning changes of the weights under it."""
        if is_sharded():
            raise InvalidConfig("relearning trains the live model, with the patch at work in it: launch without FSDP")
        lm, patch, folder = victim.lm, victim.patch, victim.folder
        _ = lm.fingerprint  # it is remembered, so it must be taken of the model as it is
        if folder is not None:  # weights under an activation patch do not tell one victim from another
            folder = folder / f"training-{'none' if patch is None else patch.digest}"
        scope = _taught(victim.scope, self.passages(victim.scope), self.data)
        with patch.on(lm) if patch is not None else contextlib.nullcontext():
            change: WeightPatch = self._lesson().fit(
                Study(lm, scope, folder=folder, progress=victim.progress), probe=look
            )
        return upon(patch, change)

    def passages(self, scope: Scope) -> tuple[Passage, ...]:
        pool = scope.forget if self.data == "forget" else scope.retain
        drawn = random.Random(self.seed).sample(range(len(pool)), min(self.k, len(pool)))
        return tuple(pool[i] for i in sorted(drawn))

    def _lesson(self) -> Finetune:
        return Finetune(
            objectives=(RetainNLL(),), lr=self.lr, max_steps=self.steps, batch_size=self.batch_size, warm_up=0,
            micro_batch=self.batch_size, schedule="constant", checkpoint_every=_CHECKPOINT_EVERY, seed=self.seed,
        )  # fmt: skip


def _taught(scope: Scope, passages: tuple[Passage, ...], data: str) -> Scope:
    """A scope whose passages to keep are those to relearn; nothing of it is to be forgotten."""
    return Scope(scope.name, forget=scope.retain if data == "forget" else scope.forget, retain=passages)


def held_out(
    victim: Victim, passages: Sequence[Passage]
) -> tuple[tuple[Metric, ...], dict[str, Asked], dict[str, float | str | None]]:
    """The leaks that can be measured, what is left to ask for them, and how much that is."""
    own = victim.benchmark.sets
    names = dict.fromkeys(name for leak in victim.leaks for name in leak.reads)
    prompts = {normalise(p.prompt) for p in passages if p.prompt is not None}
    texts = {normalise(p.text) for p in passages}
    sets = {
        n: replace(own[n], examples=tuple(e for e in own[n].examples if not _seen(e, prompts, texts))) for n in names
    }
    leaks = tuple(leak for leak in victim.leaks if all(sets[name].examples for name in leak.reads))
    n, n_all = (sum(len(s.examples) for s in some.values()) for some in (sets, {name: own[name] for name in names}))
    if not leaks:
        raise EmptyData(
            f"all {n_all} examples that leaks are read off are among the {len(passages)} relearned: take fewer"
        )
    return leaks, sets, {"relearned": len(passages), "held_out": f"{n} of {n_all}"}


def _seen(example: Probe | Passage, prompts: set[str], texts: set[str]) -> bool:
    if isinstance(example, Passage):
        return normalise(example.text) in texts
    asked = {normalise(text) for text in (example.prompt, *example.wordings)}
    return bool(asked & prompts) or any(a in text for a in asked for text in texts)


class _Curve:
    """What was seen on the way, on disk as it comes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        stored: Mapping[str, float | None] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        self.values: dict[int, float | None] = {int(step): value for step, value in stored.items()}

    def add(self, step: int, value: float | None) -> None:
        self.values[step] = value
        if self._path is not None and Processes.here().rank == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self.values).encode())
