"""Gradients of objectives at the weights of the moment, in full precision, and their inner products by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...lm import LM, Site
from ...lm.forward import run_until_stopped
from ...lm.head import Ending, ending
from ...lm.locate import blocks
from ...objectives import Objective
from ...step import Batch, LiveReference, Step, Tally
from ...training.trainable import flags_restored
from .samples import Sample

Gradient = Sequence[Tensor | None]
"""One tensor a parameter, on the CPU; None where it is zero."""
Take = Callable[[int, int, Gradient], None]
"""Told of (batch, objective, gradient)."""


@contextmanager
def measuring(lm: LM, *, only_trained: bool = False) -> Iterator[list[nn.Parameter]]:
    """The parameters whose gradients are taken, tied ones once, in float32 or float64; the model is as it was after."""
    named = [(n, p) for n, p in lm.model.named_parameters() if p.is_floating_point()]
    chosen = [p for _, p in named if p.requires_grad or not only_trained]
    full = {n: p.data.float() for n, p in named if p.dtype in (torch.bfloat16, torch.float16)}
    with flags_restored(lm.model), lm.swap(full), torch.enable_grad():
        for p in lm.model.parameters():
            p.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(True)
        yield chosen


@contextmanager
def measuring_beside(lm: LM, reference: LM | None) -> Iterator[tuple[list[nn.Parameter], LiveReference]]:
    """``measuring``, with another model, or this one as it is, for a reference."""
    known = reference or lm
    with measuring(known), measuring(lm) as parameters:
        yield parameters, LiveReference(known, ending(known.model))


class Layers(NamedTuple):
    names: list[str]
    """``embed``, the blocks by number, and ``head``."""
    of: Int[Tensor, " parameters"]
    """Which of them each parameter is in."""

    def sums(self, of_parameters: Float[Tensor, " parameters"]) -> Float[Tensor, " layers"]:
        return of_parameters.new_zeros(len(self.names)).index_add(0, self.of, of_parameters)


def layers(lm: LM, parameters: Sequence[nn.Parameter]) -> Layers:
    """Outside the blocks, what is read before the first one is ``embed``, tied matrices too; all else is ``head``."""
    before: set[nn.Parameter] = set()

    def done(module: nn.Module, _: object, __: object) -> None:
        before.update(module.parameters())

    handles = [module.register_forward_hook(done) for module in lm.model.modules()]
    try:
        with torch.no_grad(), lm.stop_at(Site("resid_pre", 0)):
            ids = torch.zeros(1, 2, dtype=torch.long, device=lm.device)
            run_until_stopped(lm.model, ids, torch.ones_like(ids, dtype=torch.bool))
    finally:
        for handle in handles:
            handle.remove()
    block = {p: i for i, one in enumerate(blocks(lm.model)) for p in one.parameters()}
    n = lm.n_layers
    index = [block[p] + 1 if p in block else 0 if p in before else n + 1 for p in parameters]
    return Layers(["embed", *map(str, range(n)), "head"], torch.tensor(index))


def steps(
    lm: LM, head: Ending, objectives: Sequence[Objective], sample: Sample, *, apart: bool = False
) -> Iterator[Step]:
    """The sample's batches as parts of one optimiser step, or with ``apart`` each as a step of its own."""
    reads = tuple(dict.fromkeys(r for o in objectives for r in o.reads(lm)))
    whole = None if apart else {split: [b[split] for b in sample.batches] for split in sample.batches[0]}
    tally = None if apart else Tally()

    def make(batch: Mapping[str, Batch]) -> Step:
        return Step(lm, batch, reads, head=head, reference=sample.reference, whole=whole, tally=tally)

    counting = [o for o in objectives if o.counts]
    if tally is not None and counting:
        with torch.no_grad():
            for batch in sample.batches:
                step = make(batch)
                for o in counting:
                    o(step)
        tally.counting = False
    yield from map(make, sample.batches)


def gradients(
    lm: LM,
    head: Ending,
    objectives: Sequence[Objective],
    sample: Sample,
    parameters: Sequence[nn.Parameter],
    take: Take,
    *,
    apart: bool = False,
) -> None:
    """Each batch's gradient of each objective; unless they are ``apart``, these add up to the gradient of all rows.

    Objectives share the forward passes, and one gradient is held at a time.
    """
    for j, step in enumerate(steps(lm, head, objectives, sample, apart=apart)):
        losses = [o(step) for o in objectives]
        for i, loss in enumerate(losses):
            take(j, i, gradient(loss, parameters, keep=i + 1 < len(losses)))


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter], *, keep: bool = False) -> Gradient:
    """``keep`` leaves the graph for another gradient."""
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return [None if g is None else g.cpu() for g in found]


def zeros(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p, device="cpu") for p in parameters]


def add_(total: Sequence[Tensor], share: Gradient, by: float = 1.0) -> None:
    for mine, theirs in zip(total, share, strict=True):
        if theirs is not None:
            mine.add_(theirs, alpha=by)


def dot(one: Gradient, other: Gradient) -> Float[Tensor, " parameters"]:
    """<one, other> by parameter, summed in float64."""
    nothing = torch.zeros((), dtype=torch.float64)
    return torch.stack(
        [
            nothing if a is None or b is None else (a * b).sum(dtype=torch.float64)
            for a, b in zip(one, other, strict=True)
        ]
    )
