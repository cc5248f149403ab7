"""Steps in which the model says what a test wants it to say: its logits and activations are leaves, with no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concept_unlearn.lm import Site
from concept_unlearn.lm.head import Head
from concept_unlearn.objectives import Objective
from concept_unlearn.step import UNSUPERVISED, Batch, Read, Reading, Step, Tally

SPLITS = ("forget", "retain", "refusal", "alternate", "retain_refusal")
ROWS = ((3, 4), (1, 1), (2, 5), (0, 3), (4, 2), (2, 1), (1, 4), (3, 6))
"""Tokens of prompt and answer; where there is no prompt the first token is supervised, and predicted by nothing."""
VOCAB, D = 11, 6
SITE = Site("resid_post", 2)
NO_MODEL: Any = SimpleNamespace(n_layers=3)


def make_batch(*rows: tuple[int, int], seed: int = 0, vocab: int = VOCAB, left: int = 0, right: int = 0) -> Batch:
    """Padded to the longest and then some; padding is made of any tokens, and labelled, so that only masks tell."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, rows))
    ids = torch.randint(vocab, (len(rows), width), generator=generator)
    places = torch.arange(width)
    lengths, prompts = (torch.tensor([f(row) for row in rows])[:, None] for f in (sum, lambda row: row[0]))
    labels = ids.where(places >= prompts, UNSUPERVISED)
    found = Batch(ids, labels, (places < lengths).expand(len(rows), -1))
    return widen(found, left, right, vocab=vocab)


def widen(batch: Batch, left: int, right: int, *, vocab: int = VOCAB) -> Batch:
    generator = torch.Generator().manual_seed(left + right)
    noise = torch.randint(vocab, (len(batch.ids), left + right), generator=generator)
    ids, labels = (torch.cat([noise[:, :left], t, noise[:, left:]], 1) for t in (batch.ids, batch.labels))
    return Batch(ids, labels, F.pad(batch.mask, (left, right)))


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    return Batch(*(t[list(rows)] for t in batch[:3]))


def make_batches(seed: int = 0, **settings: Any) -> dict[str, Batch]:
    """Of each split other lengths, so that nothing passes by taking one split's for another's."""
    rows = [[ROWS[(i + s) % len(ROWS)] for i in range(len(ROWS))] for s in range(len(SPLITS))]
    return {split: make_batch(*rows[s], seed=seed + s, **settings) for s, split in enumerate(SPLITS)}


class Bare(Head):
    """What goes into it are logits already."""

    def __init__(self, chunk: int = 2**24) -> None:
        self.module, self._chunk, self._cap, self._scale = nn.Identity(), chunk, None, 1.0

    @property
    def vocabulary(self) -> int:
        return VOCAB


@dataclass
class Scene:
    batches: Mapping[str, Batch]
    z: Mapping[str, Tensor]
    """Logits of each split, [batch, seq, vocab]."""
    z0: Mapping[str, Tensor]
    """The reference's."""
    h: Mapping[str, Tensor]
    """Activations at ``SITE``."""
    h0: Mapping[str, Tensor]

    @classmethod
    def random(cls, seed: int = 0, batches: Mapping[str, Batch] | None = None, *, vocab: int = VOCAB) -> Scene:
        batches = make_batches(seed, vocab=vocab) if batches is None else batches
        generator = torch.Generator().manual_seed(seed)

        def draw(d: int) -> dict[str, Tensor]:
            return {s: torch.randn(*b.ids.shape, d, generator=generator).double() for s, b in batches.items()}

        scene = cls(batches, draw(vocab), draw(vocab), draw(D), draw(D))
        for leaf in scene.leaves.values():
            leaf.requires_grad_()
        return scene

    @property
    def leaves(self) -> dict[tuple[str, str], Tensor]:
        return {(n, s): x for n, own in (("z", self.z), ("h", self.h)) for s, x in own.items()}

    def map(self, change: Any, batches: Mapping[str, Batch] | None = None) -> Scene:
        """Every tensor changed; what comes of a leaf leads back to it."""
        new = ({s: change(x) for s, x in own.items()} for own in (self.z, self.z0, self.h, self.h0))
        return Scene(self.batches if batches is None else batches, *new)

    def rows(self, rows: Sequence[int]) -> Scene:
        return self.map(lambda x: x[list(rows)], {s: select(b, rows) for s, b in self.batches.items()})

    def step(self, *objectives: Objective, chunk: int = 2**24, **options: Any) -> Step:
        reads = [read for objective in objectives for read in objective.reads(NO_MODEL)]
        step = Step(NO_MODEL, self.batches, reads, head=Bare(chunk), reference=Told(self), **options)
        step._passes |= {s: Reading(self.z[s], {SITE: self.h[s]}) for s in self.batches}
        return step

    def loss(self, objective: Objective, **options: Any) -> Tensor:
        return objective(self.step(objective, **options))


class Told:
    """A reference that says what the scene says it does."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def nll(self, split: str, batch: Batch) -> Tensor:
        z = Bare()(self.scene.z0[split][batch.positions()])
        return F.cross_entropy(z, F.pad(batch.ids[:, 1:], (0, 1))[batch.positions()], reduction="none")

    def hidden(self, split: str, batch: Batch, where: Any) -> Tensor:
        return self.scene.z0[split][batch.positions(where)]

    def logits(self, hidden: Tensor) -> Tensor:
        return Bare()(hidden)

    def activations(self, split: str, batch: Batch, site: Site, where: Any) -> Tensor:
        assert site == SITE
        return self.scene.h0[split][batch.positions(where)]


def gradients(loss: Tensor, leaves: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Zero where the loss does not lead; a loss that leads nowhere is zero everywhere."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), found, strict=True)}


def assert_same(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], **({"rtol": 1e-9, "atol": 1e-12} | tolerance), msg=str(key))


def in_parts(objective: Objective, parts: Sequence[Any], batches: Sequence[Mapping[str, Batch]]) -> list[Tensor]:
    """The losses of the parts of one optimiser step, by functions of (whole, tally)."""
    whole = {split: [part[split] for part in batches] for split in batches[0]}
    tally = Tally()
    if objective.counts:
        with torch.no_grad():
            for part in parts:
                part(whole=whole, tally=tally)
    tally.counting = False
    return [part(whole=whole, tally=tally) for part in parts]


def told(objective: Objective, **said: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]) -> Step:
    """A step whose token losses are these, of the model and of its reference; the model's are leaves."""
    batches = {s: make_batch(*((1, len(row)) for row in c)) for s, (c, _) in said.items()}
    step = Step(NO_MODEL, batches, objective.reads(NO_MODEL), head=Bare(), reference=object())  # type: ignore[arg-type]
    for split, (c, c0) in said.items():
        step._memo[split, "nll"] = torch.tensor([x for row in c for x in row], dtype=torch.float64, requires_grad=True)
        step._memo[Read(split, reference=True)] = torch.tensor([x for row in c0 for x in row], dtype=torch.float64)
    return step


N = ([[0.2, 1.0, 3.0, 0.5], [2.0]], [[0.1, 0.4, 1.0, 0.3], [1.5]])
"""Fixture N of the specification, model and reference."""
ALTERNATES = ([[6.0], [5.0]], [[7.0], [5.5]])


def fixture_l() -> Scene:
    """One position of four logits."""
    batches = {s: Batch(torch.tensor([[1, 0]]), torch.tensor([[-100, 0]]), torch.ones(1, 2).bool()) for s in SPLITS}

    def say(*z: float) -> dict[str, Tensor]:
        return {s: torch.tensor([[z, [9.0, 0, 0, 0]]], dtype=torch.float64, requires_grad=True) for s in SPLITS}

    nothing = {s: torch.zeros(1, 2, D) for s in SPLITS}
    return Scene(batches, say(2, 1, 0, -1), say(1, 1, 0, 0), nothing, nothing)
